"""The device a command runs on; an explicit wish is never replaced silently."""

from __future__ import annotations

from kuea_mllm.errors import UserError
from kuea_mllm.log import LOGGER


def choose_device(wish: str) -> str:
    """Return a device that exists.

    Args:
        wish: auto, cpu, cuda, cuda:<index> or mps. auto takes the first of cuda, mps, cpu that
            exists and says so.

    Raises:
        UserError: If the wished device does not exist.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wish == "auto":
        device = next(name for name, exists in available.items() if exists)
        LOGGER.info("device %s (the first of cuda, mps, cpu that exists here)", device)
        return device
    kind, _, index = wish.partition(":")
    if kind not in available:
        raise UserError(f"device '{wish}' is not one of auto, {', '.join(available)}.")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise UserError(
            f"device '{wish}' was asked for, but torch finds none.",
            "Choose --device cpu, or check the driver with `kuea-mllm doctor`.",
        )
    return wish
