"""`kuea-mllm look`: what changed inside a tower, on pictures of the user's choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.source import ImageSource, as_raised_in_worker
from kuea_mllm.data.transforms import ImageTransform, unit_pixels
from kuea_mllm.errors import DataError, KueaError, TowerMismatch
from kuea_mllm.io import atomic_directory, require_free_output, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions, utc_now
from kuea_mllm.probing.attention import AttentionView, compare_attention, require_same_patches
from kuea_mllm.probing.datasets.dataset import SomeImages
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule, tower_embedder
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.probing.kernel_views import KernelChoice, choose_kernels, kernel_matrices
from kuea_mllm.probing.layers import (
    LEAST_IMAGES,
    LayeredModel,
    compare_layers,
    layered_teacher,
    layered_tower,
)
from kuea_mllm.probing.neighbours import ALIGNED, ORIGINAL, TEACHER, PairSurvey, survey_pairs
from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.teachers.teacher import Readout, Teacher
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.workflows.look_record import (
    Embeddings,
    compare_embeddings,
    describe_pairs,
    describe_teacher,
    describe_tower,
    gaps,
)

SCHEMA_VERSION = 1

_LAYER_BATCH = 64


@dataclass(frozen=True)
class LookOptions:
    """What to look at, and with how many images.

    Attributes:
        tower: The tower that is looked at.
        against: The tower that it is compared with.
        images: Anything that `data.open.open_images` takes.
        teacher: Vision model that is shown as well.
        readout: Which output of the teacher is its embedding.
        split: Of a Hugging Face data set.
        limit: Take so many images, spread evenly over the listing.
        pictures: Images whose attention is drawn.
        pairs: Pairs of images of each kind.
        kernel: Kernels of the matrices; see `choose_kernels`.
        kernel_images: Images in a kernel matrix.
        layer_images: Images that layers are compared on, 0 for none.
        attention_images: Images that the numbers about attention are about.
        activation: Of towers that are files which do not state it.
        heads: Likewise.
        how: Device, dtype, batch size and workers.
    """

    tower: str
    against: str
    images: str
    teacher: str | None = None
    readout: Readout = "cls"
    split: str = "train"
    limit: int | None = None
    pictures: int = 6
    pairs: int = 12
    kernel: KernelChoice = "cosine"
    kernel_images: int = 64
    layer_images: int = 1024
    attention_images: int = 256
    activation: str | None = None
    heads: int | None = None
    how: Extraction = field(default_factory=Extraction)


@dataclass(frozen=True)
class _Subjects:
    tower: Tower
    against: Tower
    teacher: Teacher | None
    images: ImageSource

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform.from_spec(self.tower.spec)


def look(options: LookOptions, out: Path) -> dict[str, Any]:
    """Compare a tower with another one, and with a teacher, on the same images.

    Writes `look.json`, `report.html`, `figures/`, `kernel_matrices.json` and `attention.npz`.

    Args:
        options: What to look at.
        out: Directory to create.

    Returns:
        The content of `look.json`.

    Raises:
        UserError: If an input is wrong.
    """
    require_free_output(out)
    subjects = _open(options)
    # All that may be wrong with the choice of kernels is said before anything is computed.
    kernels = choose_kernels(options.kernel, subjects.tower.manifest, options.tower)
    embeddings = _embed(subjects, options)
    survey = survey_pairs(
        embeddings,
        shown=options.pairs,
        device=options.how.device,
        progress=lambda starts, total: iter(
            tqdm(
                starts,
                total=total,
                desc="pairs",
                unit="block",
                disable=not options.how.progress,
            )
        ),
    )
    count = len(subjects.images)
    chosen = _spread(count, options.kernel_images)
    matrices = kernel_matrices(embeddings, chosen, kernels)
    view = compare_attention(
        subjects.against,
        subjects.tower,
        subjects.images,
        _spread(count, options.attention_images).tolist(),
        drawn=_spread(count, options.pictures).tolist(),
        device=options.how.device,
        batch_size=options.how.batch_size,
    )
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": "look",
        "tower": describe_tower(subjects.tower),
        "against": describe_tower(subjects.against),
        "teacher": None if subjects.teacher is None else describe_teacher(subjects.teacher),
        "images": {
            "source": options.images,
            "count": count,
            "fingerprint": subjects.images.fingerprint(),
        },
        "embeddings": compare_embeddings(embeddings),
        "pairs": describe_pairs(survey, subjects.images),
        "kernels": {
            "student": kernels["student"][1],
            "teacher": kernels["teacher"][1],
            "images": [subjects.images.name(int(position)) for position in chosen],
            "gap": gaps(matrices),
        },
        "attention": {
            "images": [subjects.images.name(position) for position in view.positions],
            "numbers": view.numbers,
        },
        "layers": _layers(subjects, options),
        "settings": {
            **{key: value for key, value in asdict(options).items() if key != "how"},
            "device": options.how.device,
            "dtype": options.how.dtype,
            "batch_size": options.how.batch_size,
        },
        "versions": library_versions(),
        "command": current_command(),
        "created": utc_now(),
    }
    _write(out, record, matrices, view, _pair_pictures(survey, subjects))
    return record


def _open(options: LookOptions) -> _Subjects:
    images: ImageSource = open_images(options.images, split=options.split)
    if options.limit is not None and options.limit < len(images):
        images = SomeImages(images, _spread(len(images), options.limit))
    if len(images) < LEAST_IMAGES:
        raise DataError(
            f"{options.images} holds {len(images)} images; {LEAST_IMAGES} are needed at least.",
            "Give a few hundred images of the kind that the tower is for.",
        )
    tower, against = (
        load_tower(source, activation=options.activation, heads=options.heads)
        for source in (options.tower, options.against)
    )
    for each in (tower, against):
        TowerEncoder(each)  # refuses a tower without projection
    require_same_patches(against, tower)
    if tower.spec.embedding_width != against.spec.embedding_width:
        raise TowerMismatch(
            f"{tower.source} embeds in {tower.spec.embedding_width} numbers, {against.source} in "
            f"{against.spec.embedding_width}.",
            "Give --against the tower that it was made from.",
        )
    if tower.canonical_state().keys() == against.canonical_state().keys() and _is_same(
        tower, against
    ):
        LOGGER.warning("%s and %s hold the same weights", tower.source, against.source)
    teacher = None
    if options.teacher is not None:
        teacher = load_teacher(options.teacher, readout=options.readout)
        if options.layer_images:
            # Refuses a teacher without layers to read now, and not after all else is computed.
            layered_teacher(TEACHER, teacher, _sample(tower, "cpu"))
    elif named := (tower.manifest or {}).get("teacher"):
        LOGGER.info(
            "no --teacher: the one of this tower was %s; give it to see both beside it",
            named.get("reference"),
        )
    return _Subjects(tower, against, teacher, images)


def _is_same(tower: Tower, against: Tower) -> bool:
    other = against.canonical_state()
    return all(torch.equal(value, other[name]) for name, value in tower.canonical_state().items())


def _embed(subjects: _Subjects, options: LookOptions) -> Embeddings:
    embedders = {
        ORIGINAL: tower_embedder(subjects.against),
        ALIGNED: tower_embedder(subjects.tower),
    }
    if (teacher := subjects.teacher) is not None:
        # As in an alignment: the teacher sees the crop that the tower sees.
        embedders[TEACHER] = ImageEmbedder(
            module=teacher,
            fingerprint=teacher.fingerprint,
            width=teacher.width,
            rule=PixelRule(subjects.transform),
            description=teacher.source,
        )
    return {
        name: extract(subjects.images, embedder, options.how).embeddings
        for name, embedder in embedders.items()
    }


def _layers(subjects: _Subjects, options: LookOptions) -> dict[str, Any] | None:
    if options.layer_images == 0:
        return None
    device = options.how.device
    models: list[LayeredModel] = []
    for name, tower in ((ORIGINAL, subjects.against), (ALIGNED, subjects.tower)):
        models.append(layered_tower(name, TowerEncoder(tower).to(device)))
    if subjects.teacher is not None:
        sample = _sample(subjects.tower, device)
        models.append(layered_teacher(TEACHER, subjects.teacher.to(device), sample))
    names, matrix, used = compare_layers(models, _layer_batches(subjects, options))
    return {
        "tokens": "mean of the patch tokens",
        "images": used,
        "batch": _LAYER_BATCH,
        "names": [list(name) for name in names],
        "cka": [[round(value, 6) for value in row] for row in matrix.tolist()],
    }


def _sample(tower: Tower, device: str) -> Tensor:
    side = tower.spec.image_size
    return torch.linspace(0, 1, 3 * side * side, device=device).view(1, 3, side, side)


def _layer_batches(subjects: _Subjects, options: LookOptions) -> Iterator[Tensor]:
    positions = _spread(len(subjects.images), options.layer_images)
    # Mixed: neighbours in a listing are often of one class, and a batch of one class says little.
    order = np.random.Generator(np.random.PCG64(0)).permutation(positions)
    dataset: Any = ImageDataset(subjects.images, subjects.transform)
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, order.tolist()),
        batch_size=_LAYER_BATCH,
        num_workers=options.how.workers,
    )
    try:
        for batch in tqdm(loader, desc="layers", unit="batch", disable=not options.how.progress):
            yield unit_pixels(batch["pixels"].to(options.how.device))
    except KueaError as error:
        raise as_raised_in_worker(error) from None


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    """Return positions spread evenly over a listing."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(np.int64))


def _pair_pictures(survey: PairSurvey, subjects: _Subjects) -> dict[str, NDArray[np.uint8]]:
    """Return the pictures of every list of pairs, (pairs, 2, size, size, 3)."""
    return {
        kind: np.stack(
            [
                np.stack(
                    [
                        subjects.transform.to_uint8(subjects.images.read(position)).transpose(
                            1, 2, 0
                        )
                        for position in (pair.first, pair.second)
                    ]
                )
                for pair in found
            ]
        )
        for kind, found in survey.moved.items()
        if found
    }


def _write(
    out: Path,
    record: dict[str, Any],
    matrices: Embeddings,
    view: AttentionView,
    pairs: dict[str, NDArray[np.uint8]],
) -> None:
    from kuea_mllm.reporting.look import write_look_report

    with atomic_directory(out) as partial:
        write_json(partial / "look.json", record)
        kept = {name: matrix.round(6).tolist() for name, matrix in matrices.items()}
        write_json(partial / "kernel_matrices.json", kept)
        np.savez_compressed(
            partial / "attention.npz",
            images=view.images,
            original=view.original,
            aligned=view.aligned,
        )
        write_look_report(
            partial,
            record,
            matrices=matrices,
            attention=(view.images, view.original, view.aligned),
            pairs=pairs,
        )
