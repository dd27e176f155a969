"""`kuea-mllm doctor`: is this machine, and is this folder of images, fit for the work?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kuea_mllm.cli.common import Json, print_json, verb

_EXAMPLES = 3
_ACTIONS = {"leave out": "left out", "correct": "corrected", "keep": "kept"}


@verb
def doctor(
    images: Annotated[
        str | None,
        typer.Option(
            help="Also decode every image of this folder, list of files (.txt), tar shards, "
            "parquet files, data set or pack. With --data: the folder of its images."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Also check a file of conversations (JSON or JSONL), and with --images every "
            "image it names."
        ),
    ] = None,
    write_clean: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the records of --data that can be trained on to this file."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Report versions, devices, adapters and plugins; find images and data that cannot be used.

    Exits with 1 if something is broken, and was not left out of the file that was written.
    """
    _require_possible(data, write_clean)
    report = _environment()
    problems = list(report["problems"])
    if data is not None:
        report["data"], unusable = _check_data(data, images, write_clean, not json_output)
        problems += unusable
    elif images is not None:
        unreadable = _check_images(images, show_progress=not json_output)
        report["unreadable_images"] = unreadable
        problems += unreadable
    if json_output:
        print_json(report)
    else:
        _print(report)
    if problems:
        raise typer.Exit(1)


def _environment() -> dict[str, Any]:
    import os
    import shutil
    from importlib.metadata import entry_points

    import torch

    from kuea_mllm.adapters.registry import broken_adapters, list_manifests
    from kuea_mllm.manifest import library_versions

    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    broken = broken_adapters()
    problems = [f"adapter {name}: {reason}" for name, reason in broken.items()]
    plugins = [point.name for point in entry_points(group="lmms_eval.models")]
    if "kuea_mllm" not in plugins:
        problems.append(
            "lmms-eval does not see our model class: install the package, do not just put it on "
            "the path."
        )
    return {
        "versions": library_versions(),
        "cores": os.cpu_count(),
        "devices": devices,
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"},
        "adapters": {manifest.name: manifest.summary for manifest in list_manifests()},
        "lmms_eval_plugins": plugins,
        "problems": problems,
    }


def _check_images(images: str, *, show_progress: bool) -> list[str]:
    from tqdm.auto import tqdm

    from kuea_mllm.data.open import open_images
    from kuea_mllm.data.source import check_images

    source = open_images(images)
    found = check_images(source)
    bar = tqdm(found, "decode", len(source), unit="image", disable=not show_progress)
    return [problem for _, problem in bar if problem is not None]


def _require_possible(data: Path | None, write_clean: Path | None) -> None:
    from kuea_mllm.errors import UserError
    from kuea_mllm.io import require_free_output

    if write_clean is None:
        return
    if data is None:
        raise UserError("--write-clean has nothing to clean.", "Give the file with --data.")
    require_free_output(write_clean)


def _check_data(
    data: Path, images: str | None, write_clean: Path | None, show_progress: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the report on a file of conversations, and what is still to be done about it."""
    from kuea_mllm.tuning.check import check_mixture
    from kuea_mllm.tuning.check import write_clean as write

    folder = None if images is None else Path(images)
    found = check_mixture(data, folder, progress=show_progress)
    report: dict[str, Any] = found.to_dict()
    if write_clean is None:
        return report, [each.detail for each in found.problems]
    clean = write(found, write_clean)
    report["clean"] = {**clean._asdict(), "path": str(clean.path)}
    return report, []


def _print_data(report: dict[str, Any]) -> None:
    from kuea_mllm.reporting.tables import print_key_values

    facts = {
        "records": f"{report['records']}, {report['text_only']} of them without an image",
        "images": f"{report['different_images']} different files"
        + ("" if report["images"] else ", not looked at (give their folder with --images)"),
    }
    examples: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        kept = examples.setdefault(finding["kind"], [])
        if len(kept) < _EXAMPLES:
            kept.append(finding)
    verb_of = {kind: _ACTIONS[found[0]["action"]] for kind, found in examples.items()}
    conditional = "" if "clean" in report else " by --write-clean"
    for kind, number in report["counts"].items():
        suffix = "" if verb_of[kind] == "kept" else conditional
        records = "1 record" if number == 1 else f"{number} records"
        facts[kind] = f"{records}, {verb_of[kind]}{suffix}"
    print_key_values(report["data"], facts)
    for kind, found in examples.items():
        colour = typer.colors.YELLOW if verb_of[kind] == "kept" else typer.colors.RED
        for each in found:
            line = f"{kind}: record {each['index']} (id {each['id']!r}): {each['detail']}"
            typer.secho(line, fg=colour)
        if report["counts"][kind] > len(found):
            typer.echo(f"  and {report['counts'][kind] - len(found)} more; --json lists all")
    if "clean" in report:
        clean = report["clean"]
        typer.echo(
            f"{clean['path']}: {clean['records']} records, {clean['left_out']} left out, "
            f"{clean['corrected']} corrected"
        )


def _print(report: dict[str, Any]) -> None:
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values("versions", report["versions"])
    print_key_values(
        "machine",
        {
            "cores": str(report["cores"]),
            "devices": ", ".join(report["devices"]),
            "free disk here": f"{report['free_disk_gib']} GiB",
            "hub offline": "yes" if report["offline"] else "no",
        },
    )
    print_key_values("adapters", report["adapters"])
    for problem in report["problems"]:
        typer.secho(f"problem: {problem}", fg=typer.colors.RED)
    if "unreadable_images" in report:
        unreadable = report["unreadable_images"]
        for line in unreadable:
            typer.secho(line, fg=typer.colors.RED)
        typer.echo(f"{len(unreadable)} unreadable images")
    if "data" in report:
        _print_data(report["data"])
    is_clean = not any(f["action"] != "keep" for f in report.get("data", {}).get("findings", ()))
    if not report["problems"] and not report.get("unreadable_images") and is_clean:
        typer.secho("no problems found", fg=typer.colors.GREEN)
