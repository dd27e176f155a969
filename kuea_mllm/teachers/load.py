"""Open a teacher from whatever names it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from kuea_mllm.errors import TowerError
from kuea_mllm.model_files import image_settings_file
from kuea_mllm.teachers.backbone import Backbone
from kuea_mllm.teachers.huggingface import HuggingFaceBackbone, load_huggingface
from kuea_mllm.teachers.teacher import Readout, Teacher
from kuea_mllm.towers.files.checkpoints import (
    is_open_clip_repository,
    read_config,
    resolve_source,
)
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.spec import Preprocessing, Triple, parse_preprocessor

Normalisation = Literal["own", "student"]

TIMM_PREFIX = "timm:"
_HUB_PREFIX = "hf-hub:"


def load_teacher(
    source: str | Path,
    *,
    readout: Readout = "cls",
    normalisation: Normalisation = "own",
    student_mean: Triple | None = None,
    student_std: Triple | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Teacher:
    """Load a vision model of transformers or timm as a teacher (DINOv2, DINOv3, MLCD, CLIP, ...).

    Args:
        source: Directory or Hub id of transformers, timm or open_clip; `timm:NAME` for a timm model
            with the weights that timm knows for it, `timm:NAME@FILE` with those of a file.
        readout: Which output is the embedding; see `Teacher`.
        normalisation: "own" takes mean and deviation of the teacher's image processor; "student"
            those of the student, as the released KUEA code does.
        student_mean: The student's mean; needed for "student".
        student_std: The student's deviation; needed for "student".
        image_size: Side of the images in pixels; by default that of the teacher's image processor,
            or of its configuration.
        dtype: Dtype of the weights.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        TowerError: If there is no such model, it is no vision model, it lacks weights, or it has no
            such readout.
    """
    backbone, own = _open(str(source), source, readout, image_size, dtype, revision)
    if normalisation == "student":
        mean, std = student_mean, student_std
        remedy = "Pass the student's mean and deviation."
    else:
        mean, std = (own.mean, own.std) if own else (None, None)
        remedy = "Set the teacher's normalisation to student, or add a preprocessor_config.json."
    if mean is None or std is None:
        raise TowerError(f"teacher {source}: mean and deviation of its pixels are unknown.", remedy)
    side = image_size or (own and own.image_size) or getattr(backbone, "image_size", None)
    if side is None:
        raise TowerError(f"teacher {source} states no image size.", "Set the teacher's image size.")
    return Teacher(
        backbone, source=str(source), readout=readout, image_size=side, mean=mean, std=std
    )


def _open(
    name: str,
    source: str | Path,
    readout: Readout,
    image_size: int | None,
    dtype: torch.dtype,
    revision: str | None,
) -> tuple[Backbone, Preprocessing | None]:
    if name.startswith(TIMM_PREFIX):
        if revision is not None:
            raise TowerError(
                f"teacher {name}: timm chooses the revision of its own names.",
                f"Give the Hub id instead, such as timm/{name.removeprefix(TIMM_PREFIX)}.",
            )
        # Imported here and below: most teachers need no timm, which takes a second to import.
        from kuea_mllm.teachers.timm_models import load_timm_name

        return load_timm_name(name, image_size=image_size, dtype=dtype)
    if name.startswith(_HUB_PREFIX):
        source = name.removeprefix(_HUB_PREFIX)
    path = resolve_source(source, revision=revision)
    if path.is_file():
        raise TowerError(
            f"teacher {source} is a file, not a Hugging Face model.",
            "Give a model directory or a Hub id; `kuea-mllm convert` makes one of a CLIP file.",
        )
    if is_open_clip_repository(path):
        tower = load_tower(path, dtype=dtype)
        spec = tower.spec
        pixels = Preprocessing(spec.image_size, spec.mean, spec.std, spec.resize)
        return HuggingFaceBackbone(tower.model), pixels
    content = read_config(path)
    if "architecture" in content and "model_type" not in content:
        from kuea_mllm.teachers.timm_models import load_timm_directory

        return load_timm_directory(path, name, image_size=image_size, dtype=dtype)
    backbone = load_huggingface(path, name, pooled=readout == "pooled", dtype=dtype)
    return backbone, _own_preprocessing(path)


def _own_preprocessing(directory: Path) -> Preprocessing | None:
    found = image_settings_file(directory)
    return None if found is None else parse_preprocessor(found[1], str(found[0]))
