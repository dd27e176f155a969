"""Evaluation tasks for lmms-eval: four generated ones in the styles of LLaVA's benchmarks."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kuea_mllm.io import atomic_directory
from kuea_mllm.miniworld.prompts import SHORT_ANSWER
from kuea_mllm.miniworld.questions import (
    Question,
    ask_box,
    ask_colour,
    ask_count,
    ask_existence,
    ask_quarters,
    ask_reading,
)
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import Scene, sample_scenes

VERSION = 1.0
_SCORING = "kuea_mllm.miniworld.scoring"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name in lmms-eval.
        objects: Least and greatest number of digits in its pictures.
        ask: Makes the questions about one picture.
        process: Function of `scoring` that scores an answer.
        metrics: Metric names and aggregating functions of `scoring`; the first is the main one.
        max_new_tokens: Bound on the answer.
        post_prompt: Text after every question.
    """

    name: str
    objects: tuple[int, int]
    ask: Callable[[Scene, np.random.Generator], list[Question]]
    process: str
    metrics: tuple[tuple[str, str], ...]
    max_new_tokens: int
    post_prompt: str = SHORT_ANSWER


def _ask_vqa(scene: Scene, rng: np.random.Generator) -> list[Question]:
    # All colours and one count, so that a picture's questions hang together as in VQAv2.
    return [ask_count(scene), *(ask_colour(item) for item in scene.objects)]


def _ask_reading(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [*(ask_reading(item) for item in scene.objects), *ask_quarters(scene)]


def _ask_boxes(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [ask_box(item, is_coloured=flag) for item in scene.objects for flag in (False, True)]


TASKS = (
    # POPE asks about pictures with at least three objects.
    Task(
        "miniworld_pope",
        (3, 3),
        ask_existence,
        "process_pope",
        (("accuracy", "mean_score"), ("f1_score", "f1_score"), ("yes_ratio", "yes_ratio")),
        8,
    ),
    Task("miniworld_vqa", (1, 4), _ask_vqa, "process_exact", (("exact_match", "mean_score"),), 8),
    Task(
        "miniworld_textvqa",
        (1, 4),
        _ask_reading,
        "process_exact",
        (("exact_match", "mean_score"),),
        8,
    ),
    Task(
        "miniworld_refcoco",
        (1, 4),
        _ask_boxes,
        "process_box",
        (("iou_over_50", "mean_score"), ("mean_iou", "mean_score")),
        32,
        post_prompt="",
    ),
)


def write_tasks(folder: Path, *, split: str, questions_per_task: int, seed: int) -> list[str]:
    """Write a folder that lmms-eval can use as `include_path`.

    It holds one YAML file and one parquet file with embedded pictures for each task. Every picture
    has several questions, so `image_id` is the cluster for confidence intervals.

    Args:
        folder: Folder to create; must not exist.
        split: Split of the scans: "validation" or "test" for honest scores.
        questions_per_task: Number of questions in each task.
        seed: Decides pictures and questions.

    Returns:
        The names of the tasks.

    Raises:
        OutputError: If `folder` exists or cannot be created.
        DataError: If there is no such split.
    """
    with atomic_directory(folder) as partial:
        (partial / "data").mkdir()
        for number, task in enumerate(TASKS):
            rows = _make_rows(task, split, questions_per_task, [seed, 6, number])
            _write_parquet(partial / "data" / f"{task.name}.parquet", rows)
            text = yaml.dump(_task_file(task), Dumper=_Dumper, sort_keys=False)
            (partial / f"{task.name}.yaml").write_text(text, encoding="utf-8")
    return [task.name for task in TASKS]


def _make_rows(task: Task, split: str, count: int, seed: list[int]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    picture = 0
    while len(rows) < count:
        scenes = sample_scenes(200, split, seed=int(rng.integers(2**31)), objects=task.objects)
        for scene, pixels in zip(scenes, render_scenes(scenes, rng), strict=True):
            encoded = _encode_png(pixels)
            for question in task.ask(scene, rng):
                row = {
                    "question_id": f"{task.name}-{len(rows):05d}",
                    "image_id": f"{task.name}-image-{picture:05d}",
                    "image": {"bytes": encoded, "path": None},
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "width": pixels.shape[1],
                    "height": pixels.shape[0],
                }
                if question.box is not None:
                    row["bbox"] = list(question.box)
                rows.append(row)
            picture += 1
    return rows[:count]


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, List, Value

    kinds = {"image": Image(), "bbox": List(Value("float64"))}
    kinds |= dict.fromkeys(("width", "height"), Value("int64"))
    features = Features({name: kinds.get(name, Value("string")) for name in rows[0]})
    table = Dataset.from_list(rows, features=features)
    # Not its own `to_parquet`, which shows a progress bar for every file.
    pq.write_table(table.with_format("arrow")[:], path)


class _Function(str):
    """A name that the task file writes as `!function name`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)


def _task_file(task: Task) -> dict[str, Any]:
    def function(name: str) -> _Function:
        return _Function(f"{_SCORING}.{name}")

    return {
        "task": task.name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": f"data/{task.name}.parquet"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": function("doc_to_visual"),
        "doc_to_text": function("doc_to_text"),
        "doc_to_target": "answer",
        "generation_kwargs": {
            "max_new_tokens": task.max_new_tokens,
            "temperature": 0,
            "do_sample": False,
            "num_beams": 1,
        },
        "lmms_eval_specific_kwargs": {
            "default": {"pre_prompt": "", "post_prompt": task.post_prompt}
        },
        "process_results": function(task.process),
        "cluster_key": "image_id",
        "metric_list": [
            {"metric": metric, "aggregation": function(how), "higher_is_better": True}
            for metric, how in task.metrics
        ],
        "metadata": {"version": VERSION},
    }
