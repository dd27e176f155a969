"""`kuea-mllm look`: see what changed inside a tower."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from kuea_mllm.cli.common import Activation, Heads, Json, Out, print_json, verb


class Dtype(StrEnum):
    """What embeddings are computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Readout(StrEnum):
    """Which output of the teacher is its embedding."""

    CLS = "cls"
    POOLED = "pooled"
    MEAN_PATCH = "mean_patch"


class KernelOption(StrEnum):
    """Kernels of the matrices."""

    COSINE = "cosine"
    RECORDED = "recorded"


@verb
def look(
    tower: Annotated[
        str, typer.Argument(metavar="TOWER", help="HF directory, hub id or checkpoint file.")
    ],
    against: Annotated[
        str,
        typer.Option("--against", help="The tower to compare with: the original.", metavar="TOWER"),
    ],
    images: Annotated[
        str,
        typer.Option("--images", help="Folder, list, tar shards, parquet, data set or pack."),
    ],
    out: Out,
    teacher: Annotated[
        str | None, typer.Option(help="Vision model: HF directory, hub id or timm:NAME.")
    ] = None,
    readout: Annotated[
        Readout, typer.Option(help="Output of the teacher to compare with.")
    ] = Readout.CLS,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train",
    limit: Annotated[
        int | None, typer.Option(min=4, help="Take so many images, spread over the listing.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Images whose attention is drawn.")] = 6,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of images to show of each kind.")] = 12,
    kernel: Annotated[
        KernelOption,
        typer.Option(help="Kernels of the matrices: cosines, or those that TOWER was aligned by."),
    ] = KernelOption.COSINE,
    kernel_images: Annotated[int, typer.Option(min=2, help="Images in a kernel matrix.")] = 64,
    layer_images: Annotated[
        int, typer.Option(min=0, help="Images that layers are compared on; 0 leaves it out.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode images; up to 4 if left out."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Arithmetic of the embeddings.")] = Dtype.FLOAT32,
    activation: Activation = None,
    heads: Heads = None,
    json_output: Json = False,
) -> None:
    """Show what an alignment changed: attention, neighbours, moved pairs, kernels, layers.

    Writes OUT/report.html, OUT/look.json and the figures. Embeddings are cached, so that a second
    look at the same images is quick.
    """
    from kuea_mllm.errors import UserError
    from kuea_mllm.io import require_free_output

    require_free_output(out)
    if 0 < layer_images < 4:
        raise UserError(
            f"--layer-images {layer_images} is too few for a likeness of layers.",
            "Give 4 or more, or 0 to leave them out.",
        )
    from kuea_mllm.devices import choose_device
    from kuea_mllm.probing.features import Extraction
    from kuea_mllm.reporting.look import print_look
    from kuea_mllm.workflows.look import LookOptions
    from kuea_mllm.workflows.look import look as look_at

    options = LookOptions(
        tower=tower,
        against=against,
        images=images,
        teacher=teacher,
        readout=readout.value,
        split=split,
        limit=limit,
        pictures=pictures,
        pairs=pairs,
        kernel=kernel.value,
        kernel_images=kernel_images,
        layer_images=layer_images,
        activation=activation,
        heads=heads,
        how=Extraction(
            device=choose_device(device),
            dtype=dtype.value,
            batch_size=batch_size,
            workers=min(4, os.cpu_count() or 1) if workers is None else workers,
            progress=not json_output,
        ),
    )
    record = look_at(options, out)
    if json_output:
        print_json(record)
    else:
        print_look(record, str(out))
