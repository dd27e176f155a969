"""`kuea-mllm pack`: decode and crop images once, so that training only reads pixels."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, Out, print_json, verb


class Resize(StrEnum):
    """How a picture becomes square; a property of the student tower."""

    SHORTEST_EDGE = "shortest_edge"
    SQUASH = "squash"


class Format(StrEnum):
    """What `--images` can be."""

    AUTO = "auto"
    FOLDER = "folder"
    LIST = "list"
    TAR = "tar"
    PARQUET = "parquet"
    DATASET = "dataset"


@verb
def pack(
    images: Annotated[
        str,
        typer.Option(
            help="Folder, list of files (.txt), tar shards (a/{000..127}.tar), parquet files or "
            "Hugging Face data set.",
            show_default=False,
        ),
    ],
    size: Annotated[
        int,
        typer.Option(
            min=1, help="Side of the crops: the student's image size.", show_default=False
        ),
    ],
    out: Out,
    resize: Annotated[
        Resize,
        typer.Option(help="shortest_edge crops the centre (CLIP), squash distorts (SigLIP)."),
    ] = Resize.SHORTEST_EDGE,
    format: Annotated[
        Format, typer.Option(help="What the images are; auto tells by name and content.")
    ] = Format.AUTO,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    column: Annotated[
        str | None, typer.Option(help="Image column of parquet files or a data set.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="all cores")
    ] = None,
    json_output: Json = False,
) -> None:
    """Pack images as the pixels that the student sees, for `align --images DIR`.

    The pixels are bit for bit those of the live path. An interrupted run is finished by the same
    command.
    """
    from kuea_mllm.data.open import open_images
    from kuea_mllm.data.packing import describe, write_pack
    from kuea_mllm.data.transforms import ImageTransform
    from kuea_mllm.io import require_free_output

    require_free_output(out)
    source = open_images(images, format=format.value, split=split, column=column)
    finished = write_pack(
        source,
        ImageTransform(size, resize.value),
        out,
        described=images,
        workers=workers or os.cpu_count() or 1,
        progress=not json_output,
    )
    report = describe(finished)
    if json_output:
        print_json(report)
        return
    gib = report["pixel_bytes"] / 2**30
    typer.echo(f"{report['count']} images, {gib:.2f} GiB -> {out}")
    typer.echo(f"pack {report['fingerprint']}")
