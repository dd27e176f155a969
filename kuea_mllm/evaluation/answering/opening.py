"""Opening a model for evaluation: which adapter, device and number format, and which tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.adapters.records import changed_settings, name_tower, read_record, rival_weights
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMAdapter

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Placement:
    """Where and in which number format a model runs."""

    device: str
    dtype: str


def choose_adapter(model_dir: Path, name: str | None) -> MLLMAdapter:
    """Take the adapter that is asked for, or the one that recognises the directory.

    Raises:
        EvaluationError: If the directory does not exist.
        UserError: If no adapter fits, or the directory is not complete.
    """
    from kuea_mllm.adapters.registry import adapter_for, get_adapter

    if not model_dir.is_dir():
        raise EvaluationError(
            f"model directory {model_dir} does not exist.",
            "Give the directory of an MLLM, as written by `kuea-mllm swap` or downloaded.",
        )
    adapter = get_adapter(name) if name is not None else adapter_for(model_dir)
    adapter.check_base(model_dir)
    return adapter


def choose_placement(device: str | None, dtype: str) -> Placement:
    """Settle device and dtype, and say what was chosen and why.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" takes the first that is there.
        dtype: One of `DTYPES`, or "auto".

    Raises:
        UserError: If the device is not there or the dtype is unknown.
    """
    if dtype not in ("auto", *DTYPES):
        raise EvaluationError(f"dtype {dtype!r} is unknown.", f"Use auto, {', '.join(DTYPES)}.")
    wish = device or "auto"
    if wish.startswith("cuda:"):
        _require_card(wish)
        chosen = wish
    else:
        chosen = choose_device(wish)
    if dtype == "auto":
        dtype = "bfloat16" if chosen.startswith("cuda") else "float32"
        reason = "half the memory, range of float32" if dtype == "bfloat16" else "exact off CUDA"
        LOGGER.info("Number format %s on %s: %s.", dtype, chosen, reason)
    return Placement(chosen, dtype)


def open_session(adapter: MLLMAdapter, model_dir: Path, placement: Placement) -> Session:
    """Load the model, fingerprint the vision weights that it really uses, and say which they are.

    Raises:
        UserError: If the model cannot be loaded, or its tower is not the recorded one.
    """
    from kuea_mllm.towers.model.fingerprint import fingerprint_state

    runtime = adapter.open_runtime(model_dir, dtype=placement.dtype, device=placement.device)
    fingerprint = fingerprint_state(runtime.vision_state())
    _require_recorded_tower(model_dir, fingerprint, placement.dtype)
    record = read_record(model_dir)
    name = name_tower(record, fingerprint) if record else "the base's own (there is no kuea.json)"
    LOGGER.info("Opened %s with vision tower %s: %s.", model_dir, fingerprint, name)
    slot = adapter.tower_slot(model_dir)
    problems = [] if slot.reference is not None else rival_weights(model_dir)
    for problem in [*changed_settings(record, slot), *problems]:
        LOGGER.warning("%s: %s", model_dir, problem)
    return Session(runtime=runtime, fingerprint=fingerprint)


def require_tower(session: Session, fingerprint: str | None, model: str) -> None:
    """Make sure that the open model has the tower that was asked for.

    Raises:
        EvaluationError: If the fingerprints differ.
    """
    if fingerprint is not None and fingerprint != session.fingerprint:
        raise EvaluationError(
            f"model {model} holds vision tower {session.fingerprint}, not {fingerprint}.",
            "The directory has changed, or the fingerprint belongs to another model.",
        )


def _require_recorded_tower(model_dir: Path, fingerprint: str, dtype: str) -> None:
    tower = read_record(model_dir).get("tower")
    recorded = tower.get("fingerprints", {}).get(dtype) if isinstance(tower, dict) else None
    if recorded is not None and recorded != fingerprint:
        raise EvaluationError(
            f"model {model_dir} runs with vision tower {fingerprint}, but its kuea.json records "
            f"{recorded} ({dtype}).",
            "Its weights were changed after the swap: swap the tower again into a new directory.",
        )


def _require_card(device: str) -> None:
    import torch

    try:
        index = torch.device(device).index or 0
    except RuntimeError as error:
        raise EvaluationError(
            f"device {device!r} is unknown.", "Use cpu, cuda, cuda:<index> or mps."
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise EvaluationError(
            f"device {device} was asked for, but torch finds {count} CUDA devices.",
            "Use another one or --device cpu, or check CUDA_VISIBLE_DEVICES and the driver.",
        )
