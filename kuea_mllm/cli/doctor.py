"""`kuea-mllm doctor`: is this machine, and is this folder of images, fit for the work?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kuea_mllm.cli.common import Json, print_json, verb


@verb
def doctor(
    images: Annotated[
        str | None,
        typer.Option(
            help="Also decode every image of this folder, list of files (.txt), tar shards, "
            "parquet files, data set or pack."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Report versions, devices, adapters and plugins; find images that cannot be read.

    Exits with 1 if something is broken.
    """
    report = _environment()
    problems = list(report["problems"])
    if images is not None:
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
    if not report["problems"] and not report.get("unreadable_images"):
        typer.secho("no problems found", fg=typer.colors.GREEN)
