"""The optimiser of a tuning: the original's parameter groups, in full precision or eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.config.lora import TuningOptimConfig
from kuea_mllm.errors import EnvironmentFailure


def parameter_groups(
    inner: nn.Module, parts: TuningParts, optim: TuningOptimConfig
) -> list[dict[str, Any]]:
    """Divide what trains: the projector apart, at its own rate; biases and norms without decay.

    Args:
        inner: The adapter's model, LoRA layers in place.
        parts: Where its parts are.
        optim: Rates and decay.

    Returns:
        Groups that are not empty, with `name`, `params`, `lr` and `weight_decay`.
    """
    norms = {
        f"{path}.{name}"
        for path, module in inner.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            in_projector = any(name.startswith(f"{module}.") for module in parts.projector)
            decays = name not in norms and "bias" not in name
            members.setdefault((in_projector, decays), []).append(parameter)
    return [
        {
            "name": f"{'projector' if in_projector else 'LoRA'}, decay {'on' if decays else 'off'}",
            "params": parameters,
            "lr": optim.projector_lr if in_projector else optim.lr,
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (in_projector, decays), parameters in sorted(
            members.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]


def require_device(optim: TuningOptimConfig, *, is_cuda: bool) -> None:
    """Make sure that the optimiser runs on the device.

    Raises:
        EnvironmentFailure: If bitsandbytes is needed and the device is not a GPU.
    """
    if optim.optimizer != "adamw" and not is_cuda:
        raise EnvironmentFailure(
            f"key 'optim.optimizer' is {optim.optimizer}, which runs on CUDA only.",
            "Set optim.optimizer=adamw.",
        )


def make_optimizer(
    inner: nn.Module, parts: TuningParts, optim: TuningOptimConfig, *, is_cuda: bool
) -> torch.optim.Optimizer:
    """Return AdamW, or the variant of bitsandbytes that the recipe names.

    Raises:
        EnvironmentFailure: If bitsandbytes is needed and the device is not a GPU.
    """
    groups = parameter_groups(inner, parts, optim)
    settings: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=is_cuda, **settings)
    require_device(optim, is_cuda=is_cuda)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

    kinds: dict[str, Any] = {
        "adamw_8bit": AdamW8bit,
        "paged_adamw": PagedAdamW32bit,
        "paged_adamw_8bit": PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[optim.optimizer](groups, **settings)
    return optimizer
