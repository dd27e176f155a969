"""Merge LoRA weights into their base: a plain model directory, written a tensor at a time.

The base's weight files are copied with other bytes for the tensors that were tuned. Names, dtypes,
order and number of files stay the base's, so whatever loads the base loads the result. Merging goes
into the weights on disk also where the tuning ran on a quantised copy of them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.base import MLLMAdapter
from kuea_mllm.errors import EnvironmentFailure, OutputError
from kuea_mllm.io import atomic_directory, require_free_output
from kuea_mllm.log import LOGGER
from kuea_mllm.model_files import weight_files
from kuea_mllm.towers.files.model_copy import copy_model
from kuea_mllm.towers.model.fingerprint import fingerprint_all
from kuea_mllm.tuning.base_identity import tower_state
from kuea_mllm.tuning.merge_plan import MergePlan, make_plan
from kuea_mllm.tuning.merge_record import MergeReceipt, write_merge_record
from kuea_mllm.tuning.proof import prove_merge


def merge_adapter(
    base: Path | None,
    adapter: Path,
    out: Path,
    *,
    command: str | None = None,
    link: bool = True,
    mllm: MLLMAdapter | None = None,
    reference: str | None = None,
) -> MergeReceipt:
    """Write the model that LoRA weights and their base are together.

    Each tuned weight is computed in float32, W + scale * B A, and rounded once to the base's dtype.
    Everything else keeps its bytes. The base is not changed.

    Args:
        base: Model directory; None takes the one that the LoRA weights name.
        adapter: Directory of LoRA weights; see `find_lora_directory` for what users give.
        out: Directory to create.
        command: Command line to record.
        link: Whether unchanged weight files may be hard links to the base's.
        mllm: The base's adapter; recognised if absent.
        reference: What to call the LoRA weights in the record; their directory if absent.

    Raises:
        UserError: If the LoRA weights are not plain LoRA, belong to another base, touch the vision
            tower, or `out` exists.
        EnvironmentFailure: If the disk is full, a merged value does not fit the dtype, or the
            result does not read back as computed.
    """
    started = time.monotonic()
    out = Path(out)
    require_free_output(out)
    plan = make_plan(base, adapter, mllm)
    if out.resolve().is_relative_to(plan.base.resolve()):
        raise OutputError(f"output {out} lies inside of the base {plan.base}.", "Choose another.")
    with atomic_directory(out) as partial:
        files: dict[str, Any] = {
            **copy_model(plan.base, plan.places, plan.state, partial, link=link)
        }
        checked = prove_merge(plan.base, partial, plan.places, plan.state)
        written = fingerprint_all(tower_state(partial, plan.slot))
        if written["float32"] != plan.identity["vision_tower"]:
            raise EnvironmentFailure(
                f"the vision tower in {out} is not the base's any more.",
                "The disk may be faulty; run the command again.",
            )
        receipt = MergeReceipt(
            **_known(plan),
            **files,
            bytes_written=_size(partial, (*files["files_rewritten"], *files["files_copied"])),
            change=plan.state.change,
            rounding=plan.state.rounding,
            tensors_checked=checked,
            seconds=round(time.monotonic() - started, 3),
        )
        write_merge_record(plan, receipt, written, command, partial, reference or str(adapter))
    for name in receipt.files_left_out:
        LOGGER.warning("%s was left out of %s: it holds weights that are not loaded", name, out)
    return receipt


def plan_merge(
    base: Path | None, adapter: Path, *, mllm: MLLMAdapter | None = None
) -> MergeReceipt:
    """Make every check of `merge_adapter` and say what it would do; writes nothing.

    Raises:
        UserError: As `merge_adapter`.
    """
    plan = make_plan(base, adapter, mllm)
    rewritten = {plan.places[name].file for name in plan.state}
    loaded = weight_files(plan.base)
    return MergeReceipt(
        **_known(plan),
        files_rewritten=tuple(sorted(rewritten)),
        files_linked=tuple(name for name in loaded if name not in rewritten),
        bytes_written=_size(plan.base, rewritten),
    )


def _known(plan: MergePlan) -> dict[str, Any]:
    return {
        "adapter": plan.adapter.name,
        "base": str(plan.base),
        "layers_merged": len(plan.lora.pairs),
        "tensors_replaced": len(plan.lora.whole),
        "dtype": plan.state.dtype_names,
        "fingerprint": plan.identity["vision_tower"],
        "is_same_base": plan.is_same_base,
    }


def _size(directory: Path, names: Any) -> int:
    return sum((directory / name).stat().st_size for name in names)
