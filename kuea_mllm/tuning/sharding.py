"""Frozen weights divided among processes (FSDP 2); what is trained stays whole in each of them.

Frozen weights are most of the memory and never change, so that sharding them costs exchanges but no
arithmetic. What is trained goes on as in plain DDP: gradients, optimiser, checkpoints and the saved
adapter are those of an unsharded run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import RecipeError, UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.training.distributed import world_size


def require_shardable(recipe: LoraRecipe, *, processes: int | None = None) -> None:
    """Refuse a division of weights that is not one.

    Args:
        recipe: What is to run.
        processes: How many it will have; those that there are if absent.

    Raises:
        UserError: If so.
    """
    if recipe.runtime.sharding == "none":
        return
    if recipe.model.quantization != "none":
        raise RecipeError(
            f"key 'runtime.sharding' is fsdp, and model.quantization is "
            f"{recipe.model.quantization}: quantised weights cannot be divided.",
            "Set one of them to none.",
        )
    if (processes or world_size()) == 1:
        raise RecipeError(
            "key 'runtime.sharding' is fsdp, and there is one process, which would hold all.",
            "Start several with --num-processes or torchrun, or set runtime.sharding=none.",
        )


def make_mesh(device: torch.device) -> DeviceMesh:
    """Return all processes as one row of devices; every process has to ask."""
    return init_device_mesh(device.type, (world_size(),))


def shard_frozen(
    inner: nn.Module, parts: TuningParts, device: torch.device, mesh: DeviceMesh
) -> None:
    """Divide the frozen weights of the language model's layers among all processes, in place.

    A layer's weights are gathered when it runs, forward and backward. Embedding, output layer,
    projector and tower stay whole: together they are a few per cent of the model. No process has to
    wait for another in here.

    Args:
        inner: The adapter's model, LoRA layers in place; the same in all processes.
        parts: Where its parts are.
        device: Of this process. The model may lie elsewhere and comes to it a layer at a time.
        mesh: From `make_mesh`.

    Raises:
        UserError: If the language model is no stack of layers.
    """
    language_model = inner.get_submodule(parts.language_model)
    layers = _layers_of(language_model, parts.language_model)
    inside = {id(parameter) for parameter in layers.parameters()}
    whole = {p for p in language_model.parameters() if p.requires_grad or id(p) not in inside}
    settings: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True, **settings)
    # Holds no weights itself; with one root, a layer is fetched while the one before it runs.
    fully_shard(language_model, **settings)
    inner.to(device)
    parameters = [p for p in layers.parameters() if isinstance(p, DTensor)]
    own = sum(p.to_local().numel() for p in parameters)
    LOGGER.info(
        "fsdp: this process holds %s of the %s frozen parameters of %d layers",
        f"{own:,}",
        f"{sum(p.numel() for p in parameters):,}",
        len(layers),
    )


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model holds weights that `shard_frozen` divided."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def exchange_gradients(
    model: nn.Module, device: torch.device, **settings: Any
) -> DistributedDataParallel:
    """Wrap a sharded model so that the gradients of what is trained are averaged over processes.

    Args:
        model: A module around what `shard_frozen` has changed.
        device: Of this process.
        settings: For `DistributedDataParallel`.
    """
    divided = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # accelerate refuses to wrap a model with divided weights, which need no exchange here.
    wrapper: Any = DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, divided)
    return DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device], **settings
    )


def _layers_of(language_model: nn.Module, path: str) -> nn.ModuleList:
    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    stacks = [m for m in language_model.modules() if isinstance(m, nn.ModuleList)]
    found = max(stacks, key=size, default=None)
    if found is None:
        raise UserError(
            f"{path} has no list of layers to divide among processes (runtime.sharding=fsdp).",
            "Set runtime.sharding=none, with model.quantization=nf4 where memory is short.",
        )
    return found
