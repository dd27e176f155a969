"""`kuea-mllm swap`: put a tower into a multimodal LLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuea_mllm.cli.common import Activation, Heads, Json, print_json, verb

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMAdapter
    from kuea_mllm.swapping import SwapReceipt
    from kuea_mllm.swapping.sources import TowerLike


@verb
def swap(
    base: Annotated[Path, typer.Option(help="Directory of the MLLM; it is not changed.")],
    tower: Annotated[
        str,
        typer.Option(
            help="Tower: directory, hub id or checkpoint file; or an MLLM directory, whose tower "
            "is taken."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory to create; not needed with --dry-run.",
            show_default=False,
        ),
    ] = None,
    mllm: Annotated[
        str | None, typer.Option(help="Adapter, e.g. llava; recognised from BASE if left out.")
    ] = None,
    activation: Activation = None,
    heads: Heads = None,
    interpolate: Annotated[
        str | None,
        typer.Option(
            metavar="W[,W...]",
            help="Mix W parts of TOWER with 1-W parts of the tower in BASE. Several weights give "
            "a complete model each, in OUT/<weight>/.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of own images for the drift; drawn ones if left out."),
    ] = None,
    drift: Annotated[
        bool,
        typer.Option("--drift/--no-drift", help="Run both towers on probe images before."),
    ] = True,
    allow_same: Annotated[
        bool, typer.Option("--allow-same", help="Accept a tower that is already inside BASE.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Swap although activation, layer norm epsilon or image normalisation differ. "
            "Shapes, family, NaN and overflow cannot be forced. kuea.json records it.",
        ),
    ] = False,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy all files instead of linking unchanged weights."),
    ] = False,
    own_shard: Annotated[
        bool,
        typer.Option(
            "--own-shard",
            help="Give the tower a weight file of its own: later swaps into OUT, and all mixes "
            "after the first, then write only that file.",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the result to the Hub afterwards."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the compatibility report; write nothing.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Copy an MLLM with its vision tower replaced; only files with tower weights are rewritten.

    Before anything is written, base and tower are compared: what cannot fit is refused, what fits
    but is unusual is warned of. The result loads with plain `from_pretrained`; kuea.json inside
    records what was replaced, `kuea-mllm verify` checks it.
    """
    weights = _parse_weights(interpolate)
    if out is None and not dry_run:
        raise typer.BadParameter("give --out, or --dry-run to only compare.")
    if push is not None and (len(weights) > 1 or dry_run):
        raise typer.BadParameter("--push uploads one finished model.")

    from kuea_mllm.adapters.registry import adapter_for, get_adapter
    from kuea_mllm.io import require_free_output
    from kuea_mllm.swapping.sources import load_any_tower

    if out is not None:
        require_free_output(out)
    adapter = get_adapter(mllm) if mllm else adapter_for(base)
    adapter.check_base(base)
    loaded = load_any_tower(tower, activation=activation, heads=heads)
    if dry_run or out is None:
        _compare(
            base,
            loaded,
            adapter,
            weights or [None],
            images,
            drift=drift,
            force=force,
            allow_same=allow_same,
            json_output=json_output,
        )
        return

    from kuea_mllm.manifest import current_command
    from kuea_mllm.swapping import swap_mixed_files, swap_tower_files

    shared: dict[str, Any] = {
        "adapter": adapter,
        "command": current_command(),
        "force": force,
        "images": images,
        "measure_drift": drift,
        "link": not copy,
        "own_shard": own_shard,
    }
    if len(weights) > 1:
        mixed = swap_mixed_files(base, loaded, out, weights=weights, **shared)
        _report_mixed(out, mixed, json_output=json_output)
        return
    receipt = swap_tower_files(
        base, loaded, out, allow_same=allow_same, weight=weights[0] if weights else None, **shared
    )
    url = _push(out, push)
    _report(out, receipt, url, json_output=json_output)


def _parse_weights(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--interpolate takes numbers from 0 to 1 with commas between them, not {text!r}."
        ) from error


def _compare(
    base: Path,
    tower: TowerLike,
    adapter: MLLMAdapter,
    weights: list[float] | list[None],
    images: Path | None,
    *,
    drift: bool,
    force: bool,
    allow_same: bool,
    json_output: bool,
) -> None:
    """Print the report; end with exit code 2 if the swap would be refused."""
    from kuea_mllm.swapping.compatibility import examine

    examined = examine(
        base,
        tower,
        adapter,
        images=images,
        weights=weights,
        measure_drift=drift,
        allow_same=allow_same,
    )
    reports = [
        (weight, found.report.with_force() if force else found.report)
        for weight, found in examined.items()
    ]
    if json_output:
        contents = [{"weight": weight, **report.to_dict()} for weight, report in reports]
        print_json(contents[0] if len(contents) == 1 else {"mixes": contents})
    else:
        from kuea_mllm.reporting.compatibility import print_compatibility

        for weight, report in reports:
            share = "" if weight is None else f" (weight {weight:g})"
            print_compatibility(f"{tower.source} into {base}{share}", report.to_dict())
    if any(report.refusals for _, report in reports):
        raise typer.Exit(2)


def _push(out: Path, repository: str | None) -> str | None:
    if repository is None:
        return None
    from kuea_mllm.share import push_directory

    return push_directory(out, repository)


def _report(out: Path, receipt: SwapReceipt, url: str | None, *, json_output: bool) -> None:
    if json_output:
        print_json({"directory": str(out), "url": url, **receipt.to_dict()})
        return
    from kuea_mllm.reporting.tables import print_key_values

    rows = {
        "adapter": receipt.adapter,
        "tower before": receipt.fingerprint_before or "not on this machine",
        "tower now": receipt.fingerprint_after,
        **_comparison_rows(receipt),
        "tensors replaced": str(receipt.tensors_replaced),
        "files rewritten": ", ".join(receipt.files_rewritten),
        "files linked": ", ".join(receipt.files_linked),
        "dtype": receipt.dtype,
        "seconds": f"{receipt.seconds:.1f}",
        "uploaded to": url or "",
    }
    print_key_values(f"swapped into {out}", {name: text for name, text in rows.items() if text})


def _comparison_rows(receipt: SwapReceipt) -> Mapping[str, str]:
    report = receipt.compatibility
    if report is None:
        return {}
    from kuea_mllm.reporting.compatibility import count_checks

    rows = {"compatibility": count_checks(report.to_dict())}
    if report.lineage is not None:
        rows["lineage"] = f"{report.lineage.relation}: {report.lineage.evidence}"
    if report.drift is not None:
        drift = report.drift
        rows["drift at the tokens read"] = (
            f"{drift.tap_relative:.4f} relative, cosine {drift.tap_cosine:.4f} "
            f"({drift.images} images {drift.image_source})"
        )
    return rows


def _report_mixed(out: Path, receipts: Mapping[float, SwapReceipt], *, json_output: bool) -> None:
    if json_output:
        mixes = [
            {"weight": weight, "directory": str(out / f"{weight:g}"), **receipt.to_dict()}
            for weight, receipt in receipts.items()
        ]
        print_json({"directory": str(out), "mixes": mixes})
        return
    from kuea_mllm.reporting.tables import print_key_values

    rows = {}
    for weight, receipt in receipts.items():
        drift = receipt.compatibility.drift if receipt.compatibility else None
        moved = "not measured" if drift is None else f"{drift.tap_relative:.4f}"
        rows[f"{weight:g}/"] = f"drift at the tokens read {moved}, {receipt.seconds:.1f} s"
    print_key_values(f"mixes in {out}", rows)
