"""The data sets of probe recipes, one after the other: from pictures to columns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kuea_mllm.config.probe import LinearProbe, PatchProbe, ProbeData, ProbeRecipe
from kuea_mllm.data.source import ImageSource
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.probing.column import ProbeColumn
from kuea_mllm.probing.datasets.dataset import ProbeDataset, SomeImages
from kuea_mllm.probing.datasets.open import locate, open_dataset, warn_of_size
from kuea_mllm.probing.features import Extraction, FeatureStore, extract
from kuea_mllm.probing.linear import probe_linear
from kuea_mllm.probing.linear_training import LinearSettings, split_off
from kuea_mllm.probing.mmvp_vlm import MmvpVlm, open_mmvp_vlm, probe_mmvp_vlm
from kuea_mllm.probing.patch_labels import LabelledPictures, open_coco_stuff
from kuea_mllm.probing.patch_training import PatchSettings
from kuea_mllm.probing.patches import probe_patches
from kuea_mllm.probing.retrieval import probe_retrieval
from kuea_mllm.probing.zero_shot import probe_zero_shot
from kuea_mllm.workflows.probe_inputs import Split, inputs_of
from kuea_mllm.workflows.probe_subject import Subject

NEEDS_TEXT = frozenset(("zero-shot", "retrieval", "mmvp-vlm"))
_LOCAL_ONLY = frozenset(("coco-stuff", "mmvp-vlm"))
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Job:
    """One data set of one suite.

    Attributes:
        recipe: The recipe of the suite.
        data: The recipe's entry.
    """

    recipe: ProbeRecipe
    data: ProbeData

    @property
    def name(self) -> str:
        """Name that is unique over all suites, and fit for files."""
        return f"{self.recipe.suite}_{slug(self.data.name)}".replace("-", "_")

    @property
    def faults(self) -> list[str]:
        """Faults of the released code that it is scored with."""
        return [str(fault) for fault in self.recipe.faults_of(self.data)]


@dataclass(frozen=True)
class ProbePlace:
    """Where data sets lie and where the work is done.

    Attributes:
        data: Folder with a sub-folder for each data set; None fetches from the Hub.
        device: Where models are.
        progress: Whether bars are drawn.
        workers: Processes that decode pictures; None takes as many as there are cores, up to 8.
        cache: Folder of features; None takes the usual one.
        kept: Folder where a data set keeps what it has done until it is scored; None keeps nothing.
        is_checked: Whether `open_all` was called: what is odd about a size has been said then.
    """

    data: Path | None
    device: str = "cpu"
    progress: bool = False
    workers: int | None = None
    cache: Path | None = None
    kept: Path | None = None
    is_checked: bool = False

    def extraction(self, recipe: ProbeRecipe) -> Extraction:
        """Return how embeddings are computed."""
        return Extraction(
            device=self.device,
            dtype=recipe.dtype,
            batch_size=recipe.batch_size,
            workers=self.decoders,
            cache=self.cache,
            progress=self.progress,
        )

    @property
    def decoders(self) -> int:
        """Processes that decode pictures."""
        return min(_MOST_WORKERS, os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True)
class JobColumns:
    """What a job came to.

    Attributes:
        columns: Its columns.
        images: The scored pictures, for reports that show some.
        root: Folder that their names begin with.
        inputs: Fingerprints of all that they were made of, see `probe_inputs`.
        sizes: Images (or pairs) of each split, the scored one last; more than were used if there is
            a limit. Empty if they are not known.
    """

    columns: list[ProbeColumn]
    images: ImageSource
    root: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    sizes: Sequence[int] = ()


_Split = TypeVar("_Split", bound=Split)


@dataclass(frozen=True)
class _Suite(Generic[_Split]):
    """How the splits of a data set are opened, the scored one last, and how they are scored."""

    open: Callable[[Job, ProbePlace], list[_Split]]
    run: Callable[[Job, list[_Split], Subject, ProbePlace], JobColumns]


def plan_jobs(recipes: Sequence[ProbeRecipe], names: Sequence[str] | None = None) -> list[Job]:
    """Return the jobs of recipes in their order, or those of some data sets.

    Raises:
        RecipeError: If no recipe has a data set of that name.
    """
    jobs = [Job(recipe, data) for recipe in recipes for data in recipe.datasets]
    if names is None:
        return jobs
    known = dict.fromkeys(job.data.name for job in jobs)
    for name in names:
        if name not in known:
            raise RecipeError(
                f"no data set of the suite is called {name!r}.", f"Known: {', '.join(known)}."
            )
    return [job for job in jobs if job.data.name in names]


def require_data(jobs: Sequence[Job], folder: Path | None) -> None:
    """See that all data sets are there, before the first is opened.

    Raises:
        DataError: Naming those that are missing.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"--data {folder} is no directory.", "Give the folder of the data sets.")
    missing = [job.data for job in jobs if _is_missing(job.data, folder)]
    if not missing:
        return
    names = ", ".join(dict.fromkeys(f"{data.name} ({data.key})" for data in missing))
    where = "cannot be fetched by themselves" if folder is None else f"are not in {folder}"
    first = missing[0]
    raise DataError(
        f"data sets {where}: {names}.",
        f"Put {first.source} into DIR/{first.key} and give --data DIR, or choose others with "
        "--datasets.",
    )


def _is_missing(data: ProbeData, folder: Path | None) -> bool:
    return data.layout in _LOCAL_ONLY if folder is None else locate(data, folder) is None


def run_job(job: Job, subject: Subject, place: ProbePlace) -> JobColumns:
    """Score one data set.

    Raises:
        DataError: If the data set is missing, damaged or incomplete.
        TowerError: If an embedding is not finite, or the tower lacks what the suite needs.
    """
    suite = _SUITES[job.recipe.suite]
    splits = suite.open(job, place)
    inputs = {**_models(job, subject), **inputs_of(splits)}
    sizes = [split.total for split in splits]
    return replace(suite.run(job, splits, subject, place), inputs=inputs, sizes=sizes)


def open_all(jobs: Sequence[Job], subject: Subject, place: ProbePlace) -> dict[str, dict[str, str]]:
    """Open all local data sets, so that a hole in the last shows before the first is scored.

    None is kept in memory; those of the Hub would have to be fetched and are left out.

    Returns:
        What `job_inputs` gives, by the name of the job.

    Raises:
        DataError: If a data set is missing, damaged or incomplete.
        TowerError: If the tower lacks what a suite needs.
    """
    if place.data is None:
        return {}
    return {job.name: job_inputs(job, subject, place) for job in jobs}


def job_inputs(job: Job, subject: Subject, place: ProbePlace) -> dict[str, str]:
    """Return the fingerprints of all that the columns of a job would be made of now.

    Raises:
        DataError: If the data set is missing, damaged or incomplete.
        TowerError: If the tower lacks what the suite needs.
    """
    splits = _SUITES[job.recipe.suite].open(job, place)
    return {**_models(job, subject), **inputs_of(splits)}


def _models(job: Job, subject: Subject) -> dict[str, str]:
    is_patch = job.recipe.suite == "patch"
    tower = subject.tokens() if is_patch else subject.embedder(job.faults)
    found = {"tower or its preprocessing": tower.fingerprint}
    if job.recipe.suite in NEEDS_TEXT:
        found["text tower"] = subject.partner.fingerprint
    return found


def slug(name: str) -> str:
    """Return a name in lower case letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _open_scored(job: Job, place: ProbePlace) -> list[ProbeDataset]:
    return [_open_split(job, place, job.data.split)]


def _open_linear(job: Job, place: ProbePlace) -> list[ProbeDataset]:
    if job.recipe.linear is None or job.data.train_split is None:
        raise RecipeError(f"data set {job.data.name} has no settings for a linear probe.")
    return [_open_split(job, place, split) for split in (job.data.train_split, job.data.split)]


def _open_split(job: Job, place: ProbePlace, split: str) -> ProbeDataset:
    dataset = open_dataset(job.data, place.data, split=split, is_checked=place.is_checked)
    return dataset if job.recipe.limit is None else dataset.limited(job.recipe.limit)


def _open_patch(job: Job, place: ProbePlace) -> list[LabelledPictures]:
    if job.recipe.patch is None or job.data.train_split is None:
        raise RecipeError(f"data set {job.data.name} has no settings for a patch probe.")
    folder, splits = _folder(job, place), []
    for split in (job.data.train_split, job.data.split):
        pictures = open_coco_stuff(folder, split)
        if not place.is_checked:
            warn_of_size(job.data, split, len(pictures))
        limit = job.recipe.limit
        splits.append(pictures if limit is None else pictures.limited(limit))
    return splits


def _open_pairs(job: Job, place: ProbePlace) -> list[MmvpVlm]:
    return [open_mmvp_vlm(_folder(job, place), limit=job.recipe.limit)]


def _zero_shot(
    job: Job, splits: list[ProbeDataset], subject: Subject, place: ProbePlace
) -> JobColumns:
    [dataset] = splits
    store = _embed(job, dataset, subject, place, job.faults)
    column = probe_zero_shot(
        store.embeddings,
        dataset,
        subject.partner,
        name=job.data.name,
        cache=place.cache,
        details=_notes(job, store),
    )
    return JobColumns([column], dataset.images, dataset.source)


def _retrieval(
    job: Job, splits: list[ProbeDataset], subject: Subject, place: ProbePlace
) -> JobColumns:
    [dataset] = splits
    store = _embed(job, dataset, subject, place, job.faults)
    columns = probe_retrieval(
        store.embeddings,
        dataset,
        subject.partner,
        name=job.data.name,
        recall_at=job.recipe.recall_at,
        faults=job.faults,
        cache=place.cache,
        details=_notes(job, store),
    )
    return JobColumns(columns, dataset.images, dataset.source)


def _linear(
    job: Job, splits: list[ProbeDataset], subject: Subject, place: ProbePlace
) -> JobColumns:
    settings = job.recipe.linear or LinearProbe()
    train, test = splits
    # The released code leaves out the normalisation of the test pictures alone.
    train_store = _embed(job, train, subject, place, ())
    test_store = _embed(job, test, subject, place, job.faults)
    features, validation = train_store.embeddings, None
    if settings.validation is not None:
        rest, held = split_off(len(train), settings.validation, job.recipe.seed)
        validation = (features[held], _part(train, held))
        features, train = features[rest], _part(train, rest)
    column = probe_linear(
        features,
        train,
        test_store.embeddings,
        test,
        validation=validation,
        how=LinearSettings(
            lr=settings.lr,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=job.recipe.seed,
            device=place.device,
        ),
        name=f"{job.data.name} linear",
        details={**_notes(job, test_store), "train_features": train_store.describe()},
    )
    return JobColumns([column], test.images, test.source)


def _patch(
    job: Job, splits: list[LabelledPictures], subject: Subject, place: ProbePlace
) -> JobColumns:
    settings = job.recipe.patch or PatchProbe()
    train, scored = splits
    how = PatchSettings(
        **settings.model_dump(),
        seed=job.recipe.seed,
        device=place.device,
        workers=_decoders(place, len(train), settings.batch_size),
    )
    columns = probe_patches(subject.tokens(), train, scored, how=how, kept=place.kept)
    return JobColumns(columns, scored.images, str(_folder(job, place)))


def _mmvp_vlm(job: Job, splits: list[MmvpVlm], subject: Subject, place: ProbePlace) -> JobColumns:
    [pairs] = splits
    how = _extraction(job, place, len(pairs.images))
    store = extract(pairs.images, subject.embedder(job.faults), how)
    column = probe_mmvp_vlm(
        store.embeddings, pairs, subject.partner, name=job.data.name, details=_notes(job, store)
    )
    return JobColumns([column], pairs.images, pairs.source)


_SUITES: Mapping[str, _Suite[Any]] = {
    "zero-shot": _Suite(_open_scored, _zero_shot),
    "retrieval": _Suite(_open_scored, _retrieval),
    "linear": _Suite(_open_linear, _linear),
    "patch": _Suite(_open_patch, _patch),
    "mmvp-vlm": _Suite(_open_pairs, _mmvp_vlm),
}


def _embed(
    job: Job, dataset: ProbeDataset, subject: Subject, place: ProbePlace, faults: Sequence[str]
) -> FeatureStore:
    """Embed the pictures of a split, or find them embedded by another suite."""
    how = _extraction(job, place, len(dataset))
    return extract(dataset.images, subject.embedder(faults), how)


def _extraction(job: Job, place: ProbePlace, count: int) -> Extraction:
    how = place.extraction(job.recipe)
    return replace(how, workers=_decoders(place, count, how.batch_size))


def _decoders(place: ProbePlace, count: int, batch_size: int) -> int:
    # A few batches are decoded here sooner than processes are started.
    return place.decoders if count > 4 * batch_size else 0


def _part(dataset: ProbeDataset, positions: NDArray[np.int64]) -> ProbeDataset:
    labels = dataset.require_labels()
    return replace(dataset, images=SomeImages(dataset.images, positions), labels=labels[positions])


def _folder(job: Job, place: ProbePlace) -> Path:
    found = None if place.data is None else locate(job.data, place.data)
    if found is None:
        require_data([job], place.data)
        raise DataError(f"data set {job.data.name} needs a folder.", "Give --data DIR.")
    return found


def _notes(job: Job, store: FeatureStore) -> dict[str, Any]:
    return {
        "faults": job.faults,
        "features": store.describe(),
        "images_embedded": store.computed,
        "images_per_second": round(store.images_per_second, 1),
    }
