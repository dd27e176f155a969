"""Loads a LLaVA-1.5 directory exactly as asked: no other dtype, device or weights as a fallback."""

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


def load_model_and_tokenizer(model_dir: Path, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Load model and tokenizer of a directory.

    Args:
        model_dir: Complete LLaVA-1.5 directory.
        dtype: "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:<index>" or "mps".

    Returns:
        `LlavaForConditionalGeneration` in evaluation mode on its device, and its tokenizer.

    Raises:
        UserError: If the directory, the dtype or the device is not usable.
        EnvironmentFailure: If the device is too small.
    """
    from transformers import AutoTokenizer

    torch_dtype, torch_device = _resolve_dtype(dtype), resolve_device(device)
    with _failures_named(model_dir, torch_device):
        # The quick part first: an unreadable tokenizer is then found in a second.
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        return _load_model(model_dir, torch_dtype, torch_device), tokenizer


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


def _resolve_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is unknown.", f"Use one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


@contextmanager
def _failures_named(model_dir: Path, device: torch.device) -> Iterator[None]:
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


def _load_model(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import LlavaForConditionalGeneration

    # accelerate then loads straight to the card, without a copy of all weights on the host.
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    loader: Any = LlavaForConditionalGeneration
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
