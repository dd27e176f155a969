"""Baseline, +align, +peft, +both: scores and paired differences, with intervals of two kinds.

Over worlds: Student's t of the differences of each world, what another world would show. Over
questions: pictures are resampled, together in all worlds, which answered the same questions; what
other questions to the same models would show. One world has the second kind only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.comparing.stats import compare_pairs
from kuea_mllm.evaluation.results import load_results
from kuea_mllm.workflows.studies.objectives import interval

AVERAGE = "average"
# Model and what it is compared with. The last is the paper's question: does an aligned tower help
# a language model that is tuned anyway?
CONTRASTS = (("align", "baseline"), ("peft", "baseline"), ("both", "baseline"), ("both", "peft"))


@dataclass(frozen=True)
class Answers:
    """What a model scored on the questions of a task.

    Attributes:
        pictures: The picture of each question; questions about one picture depend on each other.
        scores: Score of each question in percent.
    """

    pictures: Sequence[str]
    scores: Sequence[float]


# Model -> task -> answers, of one world.
WorldScores = Mapping[str, Mapping[str, Answers]]


def read_answers(results: Path) -> dict[str, Answers]:
    """Read a results directory: task -> answers.

    Raises:
        EvaluationError: If the directory is damaged, or a question has no score.
    """
    found = load_results(results)
    answers = {}
    for task, column in found.columns.items():
        rows = found.rows(task)
        scores = [row.score for row in rows if row.score is not None]
        if len(scores) != len(rows):
            raise EvaluationError(f"column {task} of {results} has questions without a score.")
        answers[task] = Answers(
            [row.cluster for row in rows], [score * 100 / column["scale"] for score in scores]
        )
    return answers


def summarise_peft(worlds: Sequence[WorldScores]) -> dict[str, Any]:
    """Put the table together.

    Args:
        worlds: What the models of each world scored; the same questions everywhere.

    Returns:
        `scores` (model -> column -> mean over worlds in percent, and `per_seed`) and `differences`,
        a list of `model`, `to` and `columns` (column -> mean difference in points, `per_seed`,
        `low` and `high` over worlds, and the same with `p_value` under `questions`). Columns are
        the tasks and their average.
    """
    return {
        "scores": {
            model: {name: _score(worlds, model, name) for name in (*worlds[0][model], AVERAGE)}
            for model in worlds[0]
        },
        "differences": [
            {
                "model": model,
                "to": other,
                "columns": {
                    name: _difference(worlds, model, other, name)
                    for name in (*worlds[0][model], AVERAGE)
                },
            }
            for model, other in CONTRASTS
        ],
    }


def _score(worlds: Sequence[WorldScores], model: str, name: str) -> dict[str, Any]:
    per_seed = [_mean(world[model], name) for world in worlds]
    return {"mean": float(np.mean(per_seed)), "per_seed": per_seed}


def _mean(answers: Mapping[str, Answers], name: str) -> float:
    return float(np.mean([np.mean(answers[task].scores) for task in _tasks(answers, name)]))


def _difference(worlds: Sequence[WorldScores], model: str, other: str, name: str) -> dict[str, Any]:
    changes = [_mean(world[model], name) - _mean(world[other], name) for world in worlds]
    before: list[float] = []
    after: list[float] = []
    pictures: list[str] = []
    for world in worlds:
        for task in _tasks(world[model], name):
            # The tasks have as many questions each, so the mean of all is the mean of the tasks.
            before += world[other][task].scores
            after += world[model][task].scores
            pictures += (f"{task}/{picture}" for picture in world[model][task].pictures)
    found = compare_pairs(before, after, pictures, top=100.0)
    return {
        **interval(changes),
        "questions": {"low": found.low, "high": found.high, "p_value": found.p_value},
    }


def _tasks(answers: Mapping[str, Answers], name: str) -> list[str]:
    return list(answers) if name == AVERAGE else [name]
