"""`kuea-mllm calibrate`: choose the constants of the student's kernel."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kuea_mllm.cli.common import Json, SetOption, print_json, verb


class KernelFamily(StrEnum):
    """Kernels that have a constant to choose."""

    POLYNOMIAL = "polynomial"
    GAUSSIAN = "gaussian"


class Compat(StrEnum):
    """Whose convention for the teacher's pixels is followed."""

    PAPER = "paper"
    RELEASED = "released"


@verb
def calibrate(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe or YAML file.")
    ] = "align/vit_l_14",
    student: Annotated[
        str | None, typer.Option(help="Tower: HF directory, hub id or checkpoint file.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Vision model: HF directory or hub id.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images of the kind that will be trained on.")
    ] = None,
    count: Annotated[int, typer.Option(min=16, help="Images to embed.")] = 512,
    kernel: Annotated[
        KernelFamily | None,
        typer.Option(help="Kernel of the student.", show_default="that of the recipe"),
    ] = None,
    degree: Annotated[
        int | None,
        typer.Option(
            min=1, help="Power of a polynomial kernel.", show_default="that of the recipe"
        ),
    ] = None,
    readout: Annotated[
        str | None,
        typer.Option(
            help="Output of the teacher: cls, pooled or mean_patch.",
            show_default="that of the recipe",
        ),
    ] = None,
    compat: Annotated[
        Compat | None,
        typer.Option(
            help="Feed the teacher its own pixel statistics (paper) or the student's (released).",
            show_default="that of the recipe",
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for checkpoint files.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, for checkpoint files.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of images.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory to create, for calibration.json, curve.png and student_kernel.yaml.",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
    json_output: Json = False,
) -> None:
    """Choose the constants of the student's kernel from a few hundred images.

    The criterion is the authors': the kernel matrix of the untouched student shall be as near to
    the teacher's as its constants can make it. The teacher's kernel is the recipe's.
    """
    from kuea_mllm.config.align import AlignRecipe
    from kuea_mllm.config.recipes import load_recipe
    from kuea_mllm.io import require_free_output

    shorthands = {
        "student.model": student,
        "student.activation": activation,
        "student.heads": heads,
        "teacher.model": teacher,
        "teacher.readout": readout,
        "data.images": images,
        "compat": compat and compat.value,
        "runtime.seed": seed,
        "runtime.device": device,
    }
    settings: dict[str, object] = {k: v for k, v in shorthands.items() if v is not None}
    loaded = load_recipe(recipe, AlignRecipe, settings=settings, overrides=overrides or [])
    if degree is not None and kernel is KernelFamily.GAUSSIAN:
        raise typer.BadParameter("--degree belongs to the polynomial kernel.")
    if out is not None:
        require_free_output(out)

    from kuea_mllm.alignment.calibration import calibrate_recipe
    from kuea_mllm.reporting.calibration import finding, print_calibration

    record = calibrate_recipe(
        loaded,
        count=count,
        family=kernel.value if kernel else None,
        degree=degree,
        progress=not json_output,
    )
    record["finding"] = finding(record)
    if out is not None:
        _write(out, record)
    if json_output:
        print_json(record)
    else:
        print_calibration(record, None if out is None else str(out))


def _write(out: Path, record: dict[str, Any]) -> None:
    from kuea_mllm.io import atomic_directory, write_json, write_text
    from kuea_mllm.reporting.calibration import calibration_curve, recipe_fragment
    from kuea_mllm.reporting.figures import save_figure

    with atomic_directory(out) as partial:
        write_json(partial / "calibration.json", record)
        write_text(partial / "student_kernel.yaml", recipe_fragment(record))
        save_figure(calibration_curve(record), partial / "curve.png")
