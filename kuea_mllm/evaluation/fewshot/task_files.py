"""Writing few-shot tasks for lmms-eval: one per data set, number of shots and trial."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kuea_mllm.adapters.fewshot_text import TEXT_ONLY_SHOTS
from kuea_mllm.config.evaluate import (
    FLAMINGO_COLUMNS,
    FLAMINGO_PROTOCOLS,
    FLAMINGO_SUITE,
    FewShotSettings,
)
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.fewshot.captions import require_java
from kuea_mllm.evaluation.fewshot.datasets import CLASS_NAMES, DATASETS, FewShotData
from kuea_mllm.evaluation.fewshot.examples import Example, example_row
from kuea_mllm.evaluation.fewshot.plan import Plan, write_plan
from kuea_mllm.evaluation.fewshot.prompts import holds_special
from kuea_mllm.evaluation.fewshot.sampling import (
    Draw,
    draw_released,
    draw_uniform,
    in_document_order,
    require_pool,
)
from kuea_mllm.evaluation.fewshot.schemas import read_stem_pairs, require_images
from kuea_mllm.evaluation.fewshot.stemming import load_language, stem_table
from kuea_mllm.evaluation.suites.subset import draw_positions
from kuea_mllm.evaluation.task_yaml import (
    Function,
    WrittenTask,
    metadata,
    rows_of,
    write_lines,
    write_yaml,
)
from kuea_mllm.io import write_json
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

_SCORING = "kuea_mllm.evaluation.fewshot.scoring"
_METRICS = {
    "caption": ("process_caption", "cider", "cider"),
    "vqa": ("process_vqa", "vqa_accuracy", "mean_percent"),
    "hateful": ("process_hateful", "roc_auc", "roc_auc_percent"),
}
_COLUMNS: dict[str, str] = {name: column for column, name in FLAMINGO_COLUMNS.items()}
_PROTOCOLS = {compat: protocol for protocol, compat in FLAMINGO_PROTOCOLS.items()}


@dataclass(frozen=True)
class FewShotTask(WrittenTask):
    """One task that was written; its content are questions and demonstrations.

    Attributes:
        shots: Shots as they are called.
        seed: Seed of the trial.
        generation: How it is decoded.
    """

    shots: int
    seed: int
    generation: Mapping[str, Any]


def write_fewshot_tasks(
    folder: Path,
    settings: FewShotSettings,
    data: Mapping[str, str],
    *,
    limit: int | None = None,
    limit_seed: int | None = None,
    device: str = "auto",
) -> list[FewShotTask]:
    """Write the tasks of a run into an empty folder, with all that they need but the images.

    Everything that can be missing is looked for here, before a model is opened.

    Args:
        folder: Existing folder; the files name it by its absolute path.
        settings: Data sets, shots, trials.
        data: Folder of each data set.
        limit: Documents per task that the run will use; others are left out, and their images need
            not be there.
        limit_seed: Draw those documents at random; None takes the first ones.
        device: Where images are embedded for the retrieval of demonstrations.

    Raises:
        UserError: If a folder, file, image, tool or enough demonstrations are missing.
    """
    require_inputs(settings, data)
    retriever = _open_retriever(settings, device)
    tasks: list[FewShotTask] = []
    for name in settings.datasets:
        kind, source = DATASETS[name], Path(data[name])
        documents = (limit, limit_seed)
        tasks += _Writer(folder.resolve(), kind, settings, source, documents, retriever).write()
    return tasks


def require_inputs(settings: FewShotSettings, data: Mapping[str, str]) -> None:
    """Look for what can be missed without reading a data set: folders, Java, NLTK's data.

    Raises:
        EvaluationError: Naming what is missing.
    """
    for name in settings.datasets:
        if name not in data:
            raise EvaluationError(
                f"data set {name} has no folder.",
                f"Pass --set data.{name}=DIR, or --data with the folder that holds all of them, or "
                "choose others: --set 'fewshot.datasets=[coco, vqav2]'.",
            )
        if not Path(data[name]).is_dir():
            raise EvaluationError(
                f"folder {data[name]} of data set {name} does not exist.",
                f"Pass --set data.{name}=DIR; docs/fewshot.md says what it has to hold.",
            )
    kinds = [DATASETS[name] for name in settings.datasets]
    if any(kind.style == "caption" for kind in kinds):
        require_java()
    if any(kind.stem_source for kind in kinds):
        load_language()


def _open_retriever(settings: FewShotSettings, device: str) -> Retriever | None:
    if settings.retrieval is None:
        return None
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    return Retriever(settings.retrieval, device=device)


class _Writer:
    """Writes the tasks of one data set."""

    def __init__(
        self,
        folder: Path,
        data: FewShotData,
        settings: FewShotSettings,
        source: Path,
        documents: tuple[int | None, int | None],
        retriever: Retriever | None,
    ) -> None:
        self.folder = folder
        self.data = data
        self.settings = settings
        self.limit, self.limit_seed = documents
        self.retriever = retriever
        # Relative paths would change their meaning with the folder lmms-eval runs in.
        self.source = source.resolve()
        self.released = settings.compat == "released"

    def write(self) -> list[FewShotTask]:
        train = self.data.read(self.source, "train")
        test = self.data.read(self.source, "test")
        if not test:
            raise EvaluationError(f"data set {self.data.name} ({self.source}) has no documents.")
        wanted = [shots or TEXT_ONLY_SHOTS for shots in self.settings.shots]
        require_pool(wanted, len(train))
        if self.retriever is None and len(train) < self.settings.query_set:
            LOGGER.info(
                "%s: %d training examples are fewer than the query set of %d: all are drawn from.",
                self.data.name,
                len(train),
                self.settings.query_set,
            )
        stems = self._write_stems()
        pool = self.folder / f"{self.data.name}_demonstrations.jsonl"
        tasks = []
        used: set[int] = set()
        draws = self._draw_all(train, test, max(wanted))
        for seed, most in draws.items():
            for shots in self.settings.shots:
                draw = self._for_shots(most, shots or TEXT_ONLY_SHOTS, seed, len(train), len(test))
                used.update(np.unique(draw.demonstrations).tolist())
                tasks.append(self._write_task(seed, shots, draw, (train, test), pool, stems))
        shown = [train[index] for index in sorted(used)]
        self._require_images(shown)
        self._say_special(shown, is_solved=True)
        write_lines(pool, ({"number": i, **example_row(train[i])} for i in sorted(used)))
        return tasks

    def _draw_all(
        self, train: Sequence[Example], test: Sequence[Example], count: int
    ) -> dict[int, Draw]:
        """Draw once for each seed, for the largest number of shots."""
        seeds = range(self.settings.seed, self.settings.seed + self.settings.trials)
        drawn = 0 if self.retriever is not None else count
        draws = {seed: self._draw(drawn, seed, len(train), len(test)) for seed in seeds}
        if self.retriever is None:
            return draws
        # Of all seeds at once, so that an image which several of them ask about counts once.
        documents = np.unique(np.concatenate([draw.documents for draw in draws.values()]))
        shown = self.retriever.most_similar(
            [example.image for example in train],
            [test[document].image for document in documents.tolist()],
            count,
        )
        return {
            seed: Draw(
                draw.documents,
                shown[np.searchsorted(documents, draw.documents)],
                np.arange(len(train), dtype=np.int32),
            )
            for seed, draw in draws.items()
        }

    def _for_shots(self, most: Draw, shots: int, seed: int, train: int, test: int) -> Draw:
        """Return the draw for so many shots out of the one for the largest number."""
        shown = most.demonstrations
        if self.retriever is not None:
            # The most similar ones stand last.
            return Draw(most.documents, shown[:, shown.shape[1] - shots :], most.query_set)
        if self.released and shots != shown.shape[1]:
            return self._draw(shots, seed, train, test)
        return Draw(most.documents, shown[:, :shots], most.query_set)

    def _draw(self, shots: int, seed: int, train: int, test: int) -> Draw:
        options: dict[str, Any] = {
            "num_samples": self.settings.num_samples,
            "query_set": self.settings.query_set,
        }
        if not self.released and self.limit_seed is None:
            return draw_uniform(test, train, shots, seed, **options, limit=self.limit)
        # The published numbers of a document depend on all documents.
        draw = (
            in_document_order(draw_released(test, train, shots, seed, **options))
            if self.released
            else draw_uniform(test, train, shots, seed, **options)
        )
        kept = draw_positions(range(len(draw.documents)), self.limit, self.limit_seed)
        return Draw(draw.documents[kept], draw.demonstrations[kept], draw.query_set)

    def _say_special(self, examples: Sequence[Example], *, is_solved: bool) -> None:
        style = self.data.style
        count = sum(holds_special(style, example, is_solved=is_solved) for example in examples)
        if count:
            LOGGER.warning(
                "%s: %d texts hold a special token such as <image>; prompts show it as < image>.",
                self.data.name,
                count,
            )

    def _require_images(self, examples: Sequence[Example]) -> None:
        require_images(examples, f"data set {self.data.name}")

    def _write_stems(self) -> str | None:
        if self.data.stem_source is None:
            return None
        path = self.folder / f"{self.data.name}_stems.json"
        write_json(path, stem_table(read_stem_pairs(self.source / self.data.stem_source)))
        return str(path)

    def _write_task(
        self,
        seed: int,
        shots: int,
        draw: Draw,
        examples: tuple[Sequence[Example], Sequence[Example]],
        pool: Path,
        stems: str | None,
    ) -> FewShotTask:
        train, test = examples
        documents = self._write_documents(seed, draw, test, stems)
        name = f"{self.data.name}_{shots}shot_seed{seed}"
        plan = Plan(
            style=self.data.style,
            shots=shots,
            documents=str(documents),
            pool=str(pool),
            demonstrations=draw.demonstrations,
            # The published code passes them in zero-shot ranking too, where the prompt has one
            # place for an image, which the first of them takes.
            passes_images=shots > 0 or (self.released and self.data.style == "hateful"),
        )
        write_plan(self.folder / f"{name}.json", plan)
        path = self.folder / f"{name}.yaml"
        generation = self._generation()
        content = self._task_file(name, documents, self.folder / f"{name}.json", generation)
        write_yaml(path, content | {"metadata": self._metadata(shots, seed)})
        content_hash = _hash(draw, train, test, stems)
        return FewShotTask(name, self.data.name, path, content_hash, shots, seed, generation)

    def _metadata(self, shots: int, seed: int) -> dict[str, Any]:
        trial = f", seed {seed}" if self.settings.trials > 1 else ""
        return metadata(
            FLAMINGO_SUITE,
            _PROTOCOLS[self.settings.compat],
            f"{_COLUMNS[self.data.name]}, {shots} shots{trial}",
            statistic="roc_auc" if self.data.style == "hateful" else "mean",
            part=f"{shots} shots",
        )

    def _write_documents(
        self, seed: int, draw: Draw, test: Sequence[Example], stems: str | None
    ) -> Path:
        is_same = self.settings.num_samples is None
        name = self.data.name if is_same else f"{self.data.name}_seed{seed}"
        path = self.folder / f"{name}.jsonl"
        if path.exists():
            return path
        documents = draw.documents.tolist()
        rows = [test[document] for document in documents]
        self._require_images(rows)
        self._say_special(rows, is_solved=False)
        if self.data.style == "hateful" and len({example.label for example in rows}) < 2:
            raise EvaluationError(
                f"ROC-AUC needs memes of both classes, and the {len(rows)} documents of "
                f"{self.data.name} that are used have one.",
                "Use more documents: raise --limit or fewshot.num_samples, or leave them out.",
            )
        write_lines(
            path,
            (
                {"number": number, "document": document, "target": _target(row)}
                | ({} if stems is None else {"stems": stems})
                | example_row(row)
                for number, (document, row) in enumerate(zip(documents, rows, strict=True))
            ),
        )
        return path

    def _generation(self) -> dict[str, Any]:
        generation: dict[str, Any] = {
            "max_new_tokens": self.data.max_new_tokens,
            "num_beams": 3,
            "length_penalty": self.settings.length_penalty,
            "do_sample": False,
            "until": [],
            "completes": True,
            "released": self.released,
        }
        if self.data.style == "hateful":
            generation |= {"class_names": list(CLASS_NAMES), "num_beams": 1}
        return generation

    def _task_file(
        self, name: str, documents: Path, plan: Path, generation: Mapping[str, Any]
    ) -> dict[str, Any]:
        process, metric, aggregation = _METRICS[self.data.style]
        if self.released and self.data.style == "vqa":
            process += "_released"
        return {
            "task": name,
            **rows_of(documents),
            "doc_to_visual": _function("doc_to_visual"),
            "doc_to_text": _function("doc_to_text"),
            "doc_to_target": "target",
            "generation_kwargs": dict(generation),
            "lmms_eval_specific_kwargs": {"default": {"plan": str(plan)}},
            "process_results": _function(process),
            "cluster_key": "image_id",
            "metric_list": [
                {
                    "metric": metric,
                    "aggregation": _function(aggregation),
                    "higher_is_better": True,
                }
            ],
        }


def _hash(draw: Draw, train: Sequence[Example], test: Sequence[Example], stems: str | None) -> str:
    """Hash what a task asks and shows, and the stems that its answers are compared by."""
    digest = hashlib.sha256()
    if stems is not None:
        digest.update(Path(stems).read_bytes())
    for array in (draw.documents, draw.demonstrations):
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    for examples, used in ((test, draw.documents), (train, np.unique(draw.demonstrations))):
        for index in used.tolist():
            digest.update(json.dumps(example_row(examples[index])).encode() + b"\n")
    return digest.hexdigest()


def _target(example: Example) -> str:
    if example.captions:
        return example.captions[0].strip()
    if example.label is not None:
        return CLASS_NAMES[example.label]
    return Counter(example.answers).most_common(1)[0][0]


def _function(name: str) -> Function:
    return Function(f"{_SCORING}.{name}")
