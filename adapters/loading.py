"""Loads a model directory exactly as asked: no other dtype, device or weights as a fallback."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kuea_mllm.errors import EnvironmentFailure, KueaError, UserError

LOGGER = logging.getLogger("kuea_mllm")

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SDPA = "sdpa"
FLASH = "flash_attention_2"
_HALF = (torch.float16, torch.bfloat16)


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
        if is_out_of_memory(error):
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


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that device or host have no memory left."""
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def choose_attention(loader: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return the fastest attention that is there, and say in the log which it is and why.

    Args:
        loader: A model class of transformers.
        device: Where it will run.
        dtype: Of its weights.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    if device.type != "cuda":
        chosen, reason = SDPA, f"the device is {device.type}"
    elif dtype not in _HALF:
        chosen, reason = SDPA, f"flash-attn does not compute in {dtype}"
    elif not getattr(loader, "_supports_flash_attn", False):
        chosen, reason = SDPA, f"{loader.__name__} has no flash attention"
    elif not is_flash_attn_2_available():
        chosen, reason = SDPA, "flash-attn 2.3.3 or newer is not installed"
    else:
        chosen, reason = FLASH, "flash-attn is installed"
    LOGGER.info("attention: %s (%s)", chosen, reason)
    return chosen


def load_model(
    loader: Any,
    model_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = SDPA,
    quantization: object | None = None,
) -> Any:
    """Load a model in evaluation mode, straight onto its device.

    Args:
        loader: A model class of transformers.
        model_dir: Model directory, weights in safetensors.
        dtype: Dtype of the weights; with `quantization`, of those that are not quantised.
        device: Where to put it.
        attention: Implementation, as transformers calls it.
        quantization: A quantisation configuration of transformers.

    Raises:
        UserError: If the weights are not exactly those that the configuration asks for.
    """
    # accelerate then loads straight to the card, without a copy of all weights on the host.
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if quantization is not None:
        options["quantization_config"] = quantization
    model, report = loader.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(problem, ())):
            raise UserError(
                f"{model_dir} does not match its config.json: {problem.replace('_', ' ')}, "
                f"{len(names)} in all, first {names[0]}.",
                "Restore the directory; the missing tensors would be random numbers.",
            )
    return model.eval()


def empty_model(loader: Any, config: Any) -> nn.Module:
    """Return a model on the meta device, from its configuration alone.

    Args:
        loader: A model class of transformers.
        config: Its configuration.
    """
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model: Any = loader(config)
    # Weights that are one on loading are one here, and counted once.
    model.tie_weights()
    empty: nn.Module = model.eval()
    return empty


def load_for_tuning(
    loader: Any,
    model_dir: Path,
    *,
    dtype: str,
    device: str,
    quantization: object | None,
    unquantised: Sequence[str],
) -> nn.Module:
    """Load a model as it is to be tuned: nothing of it asks for a gradient.

    Args:
        loader: A model class of transformers.
        model_dir: Model directory.
        dtype: "float32" or "bfloat16".
        device: As for `resolve_device`.
        quantization: A quantisation configuration of transformers, or None.
        unquantised: Paths of modules that must keep their weights.

    Raises:
        UserError: If the directory, the dtype or the device is not usable, or a module was
            quantised that must not be.
        EnvironmentFailure: If the device is too small.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    attention = choose_attention(loader, torch_device, torch_dtype)
    with failures_named(model_dir, torch_device):
        model = load_model(
            loader,
            model_dir,
            dtype=torch_dtype,
            device=torch_device,
            attention=attention,
            quantization=quantization,
        )
    _require_unquantised(model, unquantised)
    frozen: nn.Module = model.requires_grad_(False)
    return frozen


def _require_unquantised(model: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        for name, parameter in model.get_submodule(path).named_parameters():
            if not parameter.is_floating_point():
                raise UserError(
                    f"{path}.{name} was quantised ({parameter.dtype}); only the language model "
                    "may be.",
                    f"List {', '.join(paths)} as modules to be skipped in the quantisation.",
                )
