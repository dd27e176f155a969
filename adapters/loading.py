"""Loads a model directory exactly as asked: no other dtype, device or weights as a fallback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kuea_mllm.errors import EnvironmentFailure, KueaError, UserError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ATTENTION = "sdpa"


def resolve_device(name: str) -> torch.device:
    """Return a device that exists.

    Raises:
        UserError: If the name is unknown or the device is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown.", "Use cpu, cuda or cuda:<index>.") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise UserError(
            f"device {name!r} was asked for, but torch finds none here.",
            "Choose another device (cpu), or check the driver with `kuea-mllm doctor`.",
        )
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """Return a dtype by its name.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is unknown.", f"Use one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


@contextmanager
def failures_named(model_dir: Path, device: torch.device) -> Iterator[None]:
    """Turn whatever a loader raises into one line that names the directory.

    Raises:
        UserError: If the directory cannot be loaded.
        EnvironmentFailure: If the device is too small.
    """
    try:
        yield
    except KueaError:
        raise
    # transformers and tokenizers raise anything here, bare `Exception` included.
    except Exception as error:
        if _is_out_of_memory(error):
            raise EnvironmentFailure(
                f"out of memory on {device} while loading {model_dir}.",
                "Choose a smaller dtype or a larger device.",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        raise UserError(
            f"{model_dir} cannot be loaded ({reason}).",
            "Restore the directory from its source; --debug shows the whole message.",
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def load_model(loader: Any, model_dir: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model in evaluation mode, straight onto its device.

    Args:
        loader: A model class of transformers.
        model_dir: Model directory, weights in safetensors.
        dtype: Dtype of the weights.
        device: Where to put it.

    Raises:
        UserError: If the weights are not exactly those that the configuration asks for.
    """
    # accelerate then loads straight to the card, without a copy of all weights on the host.
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    model, report = loader.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation=_ATTENTION,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **placement,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(problem, ())):
            raise UserError(
                f"{model_dir} does not match its config.json: {problem.replace('_', ' ')}, "
                f"{len(names)} in all, first {names[0]}.",
                "Restore the directory; the missing tensors would be random numbers.",
            )
    return model.eval()
