"""`kuea-mllm merge`: write LoRA weights and their base as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.tuning.merge_record import MergeReceipt


@verb
def merge(
    adapter: Annotated[
        Path,
        typer.Argument(help="LoRA weights: output of `lora`, its adapter/, or any PEFT directory."),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="Directory to create; not needed with --dry-run.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Model they were trained on; as the weights say if left out."),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy all files instead of linking unchanged weights."),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the result to the Hub afterwards."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make every check, say what would be done, stop.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Merge LoRA weights into their base, a tensor at a time; the base is not changed.

    W + scale * B A is computed in float32 and rounded once to the base's dtype. Names, dtypes and
    files stay the base's, the vision tower keeps every byte, and the result loads with plain
    `from_pretrained`. LoRA weights of another base are refused.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give OUT, or --dry-run to only check.")
    if push is not None and dry_run:
        raise typer.BadParameter("--push uploads a finished model.")
    from kuea_mllm.io import require_free_output

    if push is not None:
        from kuea_mllm.share import require_repository_name

        require_repository_name(push)
    if out is not None:
        require_free_output(out)

    from kuea_mllm.adapters.lora_directory import find_lora_directory
    from kuea_mllm.manifest import current_command
    from kuea_mllm.tuning.merge import merge_adapter, plan_merge

    weights = find_lora_directory(adapter)
    if dry_run or out is None:
        _report(plan_merge(base, weights), f"would merge {adapter}", None, json_output=json_output)
        return
    receipt = merge_adapter(base, weights, out, command=current_command(), link=not copy)
    url = None
    if push is not None:
        from kuea_mllm.share import push_directory

        url = push_directory(out, push)
    _report(receipt, f"merged {adapter} into {out}", url, json_output=json_output)


def _report(receipt: MergeReceipt, title: str, url: str | None, *, json_output: bool) -> None:
    if json_output:
        print_json(receipt.to_dict() | ({"pushed_to": url} if url else {}))
        return
    from kuea_mllm.reporting.tables import print_key_values

    rows = {
        "base": receipt.base if receipt.is_same_base else f"{receipt.base} (compared by shapes)",
        "layers merged": str(receipt.layers_merged),
        "tensors trained as a whole": str(receipt.tensors_replaced),
        "dtype": receipt.dtype,
        "vision tower": receipt.fingerprint,
        "files rewritten": ", ".join(receipt.files_rewritten),
        "files linked": ", ".join(receipt.files_linked) or "none",
        "bytes written": f"{receipt.bytes_written / 1e9:.3f} GB",
    }
    if receipt.change is not None and receipt.rounding is not None:
        rows["update / weights"] = f"{receipt.change:.2e}"
        rows["rounding / update"] = f"{receipt.rounding:.2e}"
        rows["read back and compared"] = f"{receipt.tensors_checked} tensors"
        rows["seconds"] = f"{receipt.seconds:g}"
    if url:
        rows["pushed to"] = url
    print_key_values(title, rows)
