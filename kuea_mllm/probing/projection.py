"""The projection baseline as an image encoder: the teacher, then the map into CLIP space.

`align` with `method: projection` leaves a directory without a tower: `projection.safetensors` and a
`kuea.json` that names teacher and CLIP. Here the two are put together, so that every probe of
embeddings can score the baseline like a tower. It has no tokens in CLIP's space, so there is
nothing that an MLLM could read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.io import read_json
from kuea_mllm.manifest import recorded_source
from kuea_mllm.probing.distilled import HeadedTower, holds_heads, load_headed_tower
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule
from kuea_mllm.probing.partner import require_recorded
from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.teachers.teacher import Teacher
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.spec import TowerSpec

WEIGHTS_FILE = "projection.safetensors"


class ProjectedTeacher(nn.Module):
    """A frozen teacher followed by a linear map, from pixels in [0, 1] to CLIP embeddings.

    Args:
        teacher: The teacher that the map was fitted for.
        weight: The map, (CLIP width, teacher width).
    """

    def __init__(self, teacher: Teacher, weight: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        self.weight: Tensor
        self.register_buffer("weight", weight)

    def forward(self, pixels01: Tensor) -> Tensor:
        """Embed images, (n, 3, side, side): (n, CLIP width), not normalised."""
        embedded: Tensor = self.teacher(pixels01)
        return nn.functional.linear(embedded, self.weight.to(embedded.dtype))


@dataclass(frozen=True)
class Projection:
    """The projection baseline, ready to be probed.

    Attributes:
        embedder: What embeds images.
        base: The CLIP whose space the images are mapped into; its text tower is the partner.
        revision: Of `base` on the Hub, None for the newest.
        activation: Of the CLIP, for a `base` that is a file and does not state it.
        found_by: What led to `base`: "--base" or "kuea.json".
        manifest: Content of `kuea.json`.
    """

    embedder: ImageEmbedder
    base: str
    revision: str | None
    activation: str | None
    found_by: str
    manifest: dict[str, Any]


def is_projection(source: str | Path) -> bool:
    """Whether a path is a directory (or the run directory around one) of a projection, or heads.

    The heads of a multi-teacher distillation map into CLIP's space too; see `distilled`.
    """
    return _directory(source) is not None or holds_heads(source)


def load_projection(
    source: str | Path, *, teacher: str | None = None, base: str | None = None
) -> Projection:
    """Load the projection baseline.

    Args:
        source: `projection/` of a run of `align` with `method: projection`, or the run itself; or
            `heads/` of a run with `objective.distill_weight`.
        teacher: Where the teacher lies by now; None takes what kuea.json says.
        base: Likewise the CLIP, of which preprocessing and text tower are used.

    Raises:
        TowerError: If a file is missing or damaged.
        TowerMismatch: If the teacher or the CLIP is not the one that the map was fitted for.
    """
    found_by = "kuea.json" if base is None else "--base"
    if holds_heads(source):
        return _load_heads(source, base, found_by)
    directory = _directory(source)
    if directory is None:
        raise TowerError(
            f"{source} holds no {WEIGHTS_FILE}.",
            "Make one: kuea-mllm align --recipe align/vit_l_14_projection --images DIR --out RUN.",
        )
    manifest = read_json(directory / "kuea.json")
    if not isinstance(manifest, dict) or manifest.get("kind") != "projection":
        raise TowerError(
            f"{directory / 'kuea.json'} does not describe a projection.",
            "Copy the whole directory that `kuea-mllm align` wrote.",
        )
    weight = _read_weight(directory / WEIGHTS_FILE)
    start = manifest["base_tower"]
    revision = start.get("revision") if base is None else None
    reference = base or recorded_source(start)
    try:
        clip = load_tower(reference, revision=revision)
    except TowerError as error:
        if base is not None:
            raise
        raise _cannot_open("base_tower", directory, error, "--base") from error
    if clip.fingerprint != start["fingerprint"]:
        raise TowerMismatch(
            f"{clip.source} is not the CLIP that {directory} was fitted for: its fingerprint is "
            f"{clip.fingerprint[:12]}, kuea.json says {start['fingerprint'][:12]}.",
            "Give --base: the right one.",
        )
    if weight.shape[0] != clip.spec.embedding_width:
        raise TowerMismatch(
            f"{directory / WEIGHTS_FILE}: weight maps into {weight.shape[0]} numbers, "
            f"{clip.source} embeds in {clip.spec.embedding_width}.",
            "Fit the projection again.",
        )
    loaded = _load_teacher(manifest["teacher"], teacher, clip.spec.mean, clip.spec.std, directory)
    if weight.shape[1] != loaded.width:
        raise TowerMismatch(
            f"{directory / WEIGHTS_FILE}: weight maps from {weight.shape[1]} numbers, teacher "
            f"{loaded.source} embeds in {loaded.width}.",
            "Fit the projection again.",
        )
    # The teacher gets what it got when the map was fitted: the CLIP's crop.
    rule = PixelRule(ImageTransform.from_spec(clip.spec))
    made_of = json.dumps([loaded.fingerprint, rule.fingerprint])
    embedder = ImageEmbedder(
        module=ProjectedTeacher(loaded, weight),
        fingerprint=fingerprint_tensors([(made_of, torch.empty(0)), ("weight", weight)]),
        width=int(weight.shape[0]),
        rule=rule,
        description=f"{loaded.source} mapped into the space of {clip.source} ({directory})",
    )
    activation = _activation(clip.spec)
    return Projection(embedder, reference, revision, activation, found_by, manifest)


def _load_heads(source: str | Path, base: str | None, found_by: str) -> Projection:
    embedder, record = load_headed_tower(source)
    start, spec = record["base_tower"], cast(HeadedTower, embedder.module).encoder.spec
    activation = _activation(spec)
    if base is None:
        try:
            require_recorded(start, str(source), activation=activation, heads=spec.heads)
        except TowerError as error:
            raise _cannot_open("base_tower", Path(source), error, "--base") from error
    revision = start.get("revision") if base is None else None
    reference = base or recorded_source(start)
    return Projection(embedder, reference, revision, activation, found_by, record)


def _activation(spec: TowerSpec) -> str | None:
    return spec.activation if spec.family == "clip" else None


def _directory(source: str | Path) -> Path | None:
    for candidate in (Path(source), Path(source) / "projection"):
        if (candidate / WEIGHTS_FILE).is_file():
            return candidate
    return None


def _read_weight(path: Path) -> Tensor:
    try:
        content = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TowerError(
            f"{path} is damaged: {error}.", "Fit the projection again, or copy the file again."
        ) from error
    weight = content.get("weight")
    if weight is None or weight.ndim != 2:
        raise TowerError(f"{path} holds no matrix named weight.", "Fit the projection again.")
    if not bool(weight.isfinite().all()):
        raise TowerError(f"{path}: weight holds NaN or infinity.", "Fit the projection again.")
    return weight.float()


def _load_teacher(
    record: Mapping[str, Any],
    instead: str | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    directory: Path,
) -> Teacher:
    try:
        teacher = load_teacher(
            instead or recorded_source(record),
            readout=record["readout"],
            normalisation=record["normalisation"],
            student_mean=mean,
            student_std=std,
            image_size=record["image_size"],
        )
    except TowerError as error:
        if instead is not None:
            raise
        raise _cannot_open("teacher", directory, error, "--teacher") from error
    if teacher.fingerprint != record["fingerprint"]:
        raise TowerMismatch(
            f"teacher {teacher.source} is not the one that {directory} was fitted for (another "
            "fingerprint: weights, readout, size or normalisation).",
            "Give --teacher: the model that kuea.json names, in the same version.",
        )
    return teacher


def _cannot_open(key: str, directory: Path, error: TowerError, option: str) -> TowerError:
    """Say whose record led to a model that cannot be opened, and what takes its place."""
    return TowerError(
        f"key {key}.reference of {directory / 'kuea.json'} names a model that cannot be opened: "
        f"{error.problem}",
        f"Give {option}: where it lies by now.",
    )
