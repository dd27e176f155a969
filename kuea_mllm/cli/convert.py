"""`kuea-mllm convert`: read a tower in any known format, write it in another, or just look."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuea_mllm.cli.common import Activation, Heads, Json, print_json, verb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kuea_mllm.adapters.base import LoraConverter, MLLMAdapter
    from kuea_mllm.towers.converting.conversion import Conversion


class Format(StrEnum):
    """Formats that a tower can be written in."""

    HF = "hf"
    OPEN_CLIP = "open_clip"
    OPENAI = "openai"
    VISUAL = "visual"
    RELEASED = "released"


class Dtype(StrEnum):
    """Dtypes that a tower can be written in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@verb
def convert(
    source: Annotated[
        str, typer.Argument(help="HF directory, open_clip repository, hub id or checkpoint file.")
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="Directory (hf, open_clip) or file (visual, openai) to create.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Format,
        typer.Option(
            help="hf: directory for from_pretrained; open_clip: repository for open_clip's "
            "local-dir: and hf-hub:; visual: open_clip visual state dict, as the KUEA authors "
            "release (SigLIP: timm trunk); openai: full OpenAI CLIP state dict, as DIVA releases; "
            "released: with --mllm, a whole Hugging Face MLLM, or LoRA weights for it, back as its "
            "authors release it."
        ),
    ] = Format.HF,
    text_from: Annotated[
        str | None,
        typer.Option(
            help="Full CLIP whose text tower is taken (OpenAI or open_clip state dict, open_clip "
            "repository, HF directory, hub id): needed for openai and open_clip; with hf it makes "
            "a full CLIPModel."
        ),
    ] = None,
    activation: Activation = None,
    heads: Heads = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype to write; without it every tensor keeps its own, unrounded."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Resize the position embeddings for images of this side in pixels, as open_clip "
            "does; the drift is measured. Without it nothing is resized."
        ),
    ] = None,
    interpolate: Annotated[
        str | None,
        typer.Option(
            metavar="W[,W...]",
            help="Mix with --original: W of SOURCE and 1 - W of ORIGINAL. Several weights write "
            "DESTINATION/W each.",
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="With --interpolate: the tower SOURCE was made from.")
    ] = None,
    mllm: Annotated[
        str | None,
        typer.Option(
            help="SOURCE is a whole MLLM in its authors' layout, or LoRA weights for it: adapter "
            "that makes a Hugging Face directory of it, e.g. llava."
        ),
    ] = None,
    tower: Annotated[
        str | None,
        typer.Option(help="With --mllm: vision tower, where SOURCE only names one or none."),
    ] = None,
    language_model: Annotated[
        Path | None,
        typer.Option(
            help="With --mllm openflamingo: directory of the language model, where it does not lie "
            "in SOURCE."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="With --mllm openflamingo: tokenizer; the language model's if left out."),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="With --mllm openflamingo: take an 'embedding' or a 'tower' that is not the "
            "release's.",
        ),
    ] = None,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check", help="Do not run source and result in their own libraries to compare."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the written directory to the Hub."),
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Only tell what SOURCE is; write nothing.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Convert a vision tower exactly, and compare the result before it gets its name.

    No tensor is rounded, resized or guessed unless that is asked for. Source and result run on
    probe images in the libraries of their formats; if embedding or patch tokens differ, nothing is
    written.
    """
    if inspect:
        from kuea_mllm.cli.inspect import print_inspection

        print_inspection(source, json_output)
        return
    if destination is None:
        raise typer.BadParameter("give DESTINATION, or --inspect to only look at SOURCE.")
    if mllm is None and tower is not None:
        raise typer.BadParameter("--tower goes with --mllm; a tower alone is SOURCE itself.")
    if mllm is None and (language_model or tokenizer or accept or to is Format.RELEASED):
        raise typer.BadParameter(
            "--language-model, --tokenizer, --accept and --to released go with --mllm."
        )
    weights = _weights(interpolate)
    if (weights is None) != (original is None):
        raise typer.BadParameter("--interpolate and --original go together.")
    _refuse_push(push, to, weights)
    if mllm is not None:
        changes = (text_from, dtype, image_size, interpolate)
        if any(change is not None for change in changes) or to not in (Format.HF, Format.RELEASED):
            raise typer.BadParameter(
                "--text-from, --dtype, --image-size, --interpolate and --to other than hf and "
                "released are for towers; --mllm converts a whole model as it is."
            )
        if to is Format.RELEASED:
            if language_model or tokenizer or activation or heads or accept:
                raise typer.BadParameter("--to released takes everything from SOURCE.")
            _export_mllm(mllm, Path(source), destination, tower, json_output)
            return
        parts = _Parts(language_model, tokenizer, activation, heads, tuple(accept or ()))
        _import_mllm(mllm, Path(source), destination, tower, parts, json_output)
        _push(push, destination, json_output)
        return
    from kuea_mllm.manifest import current_command
    from kuea_mllm.towers.converting.conversion import Changes, convert_tower

    is_sweep = weights is not None and len(weights) > 1
    done = convert_tower(
        source,
        destination,
        to=to.value,
        text_from=text_from,
        activation=activation,
        heads=heads,
        changes=Changes(
            dtype=dtype.value if dtype else None,
            image_size=image_size,
            original=original,
            weight=weights[0] if weights else 1.0,
        ),
        weights=weights if is_sweep else None,
        check=not no_check,
        command=current_command(),
    )
    if json_output:
        records = [one.to_dict() for one in done]
        content = {"destination": str(destination), "results": records} if is_sweep else records[0]
        print_json(content | ({"pushed_to": _push(push, destination, True)} if push else {}))
        return
    for one in done:
        _print_conversion(source, one)
    _push(push, destination, json_output)


def _refuse_push(push: str | None, to: Format, weights: Sequence[float] | None) -> None:
    if push is None:
        return
    if to not in (Format.HF, Format.OPEN_CLIP) or (weights is not None and len(weights) > 1):
        raise typer.BadParameter("--push uploads one directory, of --to hf or open_clip.")
    from kuea_mllm.share import require_repository_name

    require_repository_name(push)


def _weights(text: str | None) -> Sequence[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--interpolate {text!r} is no number or list of numbers, such as 0.25,0.5,0.75."
        ) from error


@dataclass(frozen=True)
class _Parts:
    """What names the parts of a release that lie apart, and their unstated properties."""

    language_model: Path | None
    tokenizer: Path | None
    activation: str | None
    heads: int | None
    accept: tuple[str, ...] = ()


def _import_mllm(
    name: str,
    source: Path,
    destination: Path,
    tower: str | None,
    parts: _Parts,
    json_output: bool,
) -> None:
    from kuea_mllm.adapters.base import MLLMImporter, MLLMPartsImporter
    from kuea_mllm.adapters.lora_directory import is_lora_directory
    from kuea_mllm.adapters.registry import get_adapter
    from kuea_mllm.errors import UserError
    from kuea_mllm.manifest import current_command

    adapter = get_adapter(name)
    command = current_command()
    if is_lora_directory(source):
        if tower or any(asdict(parts).values()):
            raise typer.BadParameter(f"{source} holds LoRA weights, which have no parts.")
        _lora_converter(adapter).import_lora(source, destination, command=command)
    elif isinstance(adapter, MLLMPartsImporter):
        adapter.import_parts(source, destination, tower=tower, command=command, **asdict(parts))
    elif not isinstance(adapter, MLLMImporter):
        raise UserError(
            f"the adapter {name} cannot convert whole models.",
            "Leave out --mllm if SOURCE is a tower; `kuea-mllm swap` takes MLLM directories.",
        )
    elif given := [f"--{key.replace('_', '-')}" for key, value in asdict(parts).items() if value]:
        raise typer.BadParameter(f"{', '.join(given)}: {name} is released in one directory.")
    else:
        adapter.import_released(source, destination, tower=tower, command=command)
    if json_output:
        print_json({"destination": str(destination), "to": "hf", "mllm": name})
        return
    typer.echo(f"{source} ({name}, authors' layout) -> {destination} (hf)")


def _export_mllm(
    name: str, source: Path, destination: Path, tower: str | None, json_output: bool
) -> None:
    from kuea_mllm.adapters.base import MLLMExporter
    from kuea_mllm.adapters.lora_directory import is_lora_directory
    from kuea_mllm.adapters.registry import get_adapter
    from kuea_mllm.errors import UserError

    adapter = get_adapter(name)
    if is_lora_directory(source):
        _lora_converter(adapter).export_lora(source, destination, tower=tower)
    elif tower:
        raise typer.BadParameter("--to released takes everything from SOURCE.")
    elif not isinstance(adapter, MLLMExporter):
        raise UserError(f"the adapter {name} has no way back to its authors' files.")
    else:
        adapter.export_released(source, destination)
    if json_output:
        print_json({"destination": str(destination), "to": "released", "mllm": name})
        return
    typer.echo(f"{source} (hf) -> {destination} ({name}, authors' layout)")


def _lora_converter(adapter: MLLMAdapter) -> LoraConverter:
    from kuea_mllm.adapters.base import LoraConverter
    from kuea_mllm.errors import UserError

    if not isinstance(adapter, LoraConverter):
        raise UserError(
            f"the adapter {adapter.name} has no layout of its own for LoRA weights.",
            "`kuea-mllm merge` takes PEFT directories as they are.",
        )
    return adapter


def _push(repo: str | None, directory: Path, json_output: bool) -> str | None:
    if repo is None:
        return None
    from kuea_mllm.share import push_directory

    address = push_directory(directory, repo)
    if not json_output:
        typer.echo(f"pushed to {address}")
    return address


def _print_conversion(source: str, done: Conversion) -> None:
    from kuea_mllm.reporting.conversion import print_conversion

    print_conversion(source, done.to_dict())
