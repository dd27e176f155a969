"""Put a tower into a model that is loaded already."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import MLLMAdapter, TowerSlot
from kuea_mllm.adapters.registry import list_manifests
from kuea_mllm.errors import TowerMismatch, UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.swapping.fit import FittedState, architecture_checks
from kuea_mllm.swapping.lineage import judge_lineage, scan_weights, value_check
from kuea_mllm.swapping.receipt import SwapReceipt
from kuea_mllm.swapping.report import CompatibilityReport
from kuea_mllm.swapping.sources import TowerLike
from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.model.fingerprint import fingerprint_state


def swap_tower(
    model: nn.Module,
    tower: TowerLike,
    adapter: MLLMAdapter | None = None,
    *,
    allow_same: bool = False,
    force: bool = False,
) -> SwapReceipt:
    """Replace the vision tower of a loaded model in place, in the model's dtype and on its device.

    Parameters stay the same objects, so that an optimizer or a compiled graph keeps working. How
    the model normalises images is not known here; `swap_tower_files` compares that as well.

    Args:
        model: The model, or its inner model; on any device, in any float dtype.
        tower: The tower to put in; see `kuea_mllm.swapping.sources.load_any_tower`.
        adapter: The model's adapter; found by `model.config` if left out.
        allow_same: Accept a tower that the model holds already.
        force: Accept another activation or layer norm epsilon.

    Raises:
        TowerMismatch: If the tower does not fit, or is the one that the model holds already; the
            model is unchanged then.
        UserError: If no adapter knows the model, or its tower is not in memory as floats.
    """
    started = time.monotonic()
    adapter = adapter or adapter_for_model(model)
    module: Any = adapter.vision_module(model)
    where = f"a loaded {type(model).__name__}"
    if not hasattr(module, "config"):
        raise UserError(f"the vision tower of {where} has no transformers configuration.")
    vision_config = module.config.to_dict()
    family = "siglip" if "siglip" in str(vision_config.get("model_type")) else "clip"
    slot = TowerSlot(vision_config, module="", tap=None, family=family)
    report = CompatibilityReport(tuple(architecture_checks(slot, tower.spec)))
    (report.with_force() if force else report).require(where)
    targets = _targets(module, where)
    fitted = FittedState(tower.canonical_state(), targets, where)
    scan = scan_weights(targets, fitted)
    lineage, lineage_check = judge_lineage(
        scan, tower_fingerprint=tower.fingerprint, tower_record=tower.manifest, base_record={}
    )
    checks = (*report.checks, value_check(scan, fitted), lineage_check)
    report = CompatibilityReport(checks, lineage)
    report = report.with_force() if force else report
    report.require(where)
    if scan.before == scan.after and not allow_same:
        raise TowerMismatch(
            f"the tower {tower.source} is the one that {where} holds already ({scan.after[:12]})."
        )
    for check in report.warnings:
        LOGGER.warning("%s: %s. %s", check.name, check.tower.rstrip("."), check.remedy)
    with torch.no_grad():
        for name, tensor in fitted.items():
            targets[name].copy_(tensor)
    return SwapReceipt(
        adapter=adapter.name,
        fingerprint_before=scan.before or "",
        fingerprint_after=fingerprint_state(targets),
        tensors_replaced=len(fitted),
        key_prefix="",
        dtype=fitted.dtype_names,
        seconds=round(time.monotonic() - started, 3),
        compatibility=report,
    )


def adapter_for_model(model: nn.Module) -> MLLMAdapter:
    """Find the adapter of a loaded model by its configuration.

    Raises:
        UserError: If the model has no configuration, or no adapter recognises it.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UserError(
            f"a {type(model).__name__} has no transformers configuration to find its adapter by.",
            "Pass the adapter: kuea_mllm.adapters.registry.get_adapter(name).",
        )
    content = config.to_dict()
    # Fallback adapters last: they recognise what a specific one knows better.
    for manifest in sorted(list_manifests(), key=lambda manifest: manifest.is_fallback):
        adapter = manifest.load()
        if adapter.recognises(content):
            return adapter
    raise UserError(
        f"no adapter recognises a {type(model).__name__} (model_type "
        f"{content.get('model_type')!r}).",
        f"Installed: {', '.join(manifest.name for manifest in list_manifests()) or 'none'}.",
    )


def _targets(module: nn.Module, where: str) -> Mapping[str, Tensor]:
    targets = {
        name.removeprefix(keys.HF_PREFIX): tensor
        for name, tensor in module.state_dict().items()
        if not name.endswith(keys.IGNORED_SUFFIX)
    }
    for name, tensor in targets.items():
        if tensor.is_meta:
            raise UserError(
                f"tensor {name} of {where} is not in memory (device meta): accelerate has put it "
                "aside, or nothing was loaded yet.",
                "Load the model without offloading, or use `kuea-mllm swap` on its files.",
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TowerMismatch(
                f"the tower tensor {name} of {where} is stored as {tensor.dtype}, which is "
                "quantised.",
                "Swap the tower into the unquantised model, and quantise it afterwards.",
            )
    return targets
