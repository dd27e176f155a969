"""Which demonstrations each document of one task is shown, as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kuea_mllm.evaluation.fewshot.datasets import Style
from kuea_mllm.io import read_json, write_json


@dataclass(frozen=True)
class Plan:
    """One task: a data set with a number of shots and a seed.

    Attributes:
        style: Prompt of the data set.
        shots: Shots as they are called; zero shows two demonstrations without their images.
        documents: File of the questions.
        pool: File of the demonstrations.
        demonstrations: The numbers of each document's demonstrations in their order, (documents,
            shots), int32.
        passes_images: Whether the images of the demonstrations are passed to the model.
    """

    style: Style
    shots: int
    documents: str
    pool: str
    demonstrations: npt.NDArray[np.int32]
    passes_images: bool


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON, with the demonstrations in an array file beside it."""
    values: dict[str, Any] = {**vars(plan)}
    np.save(path.with_suffix(".npy"), values.pop("demonstrations"))
    write_json(path, values)


def read_plan(path: Path) -> Plan:
    """Read a plan back."""
    return Plan(**read_json(path), demonstrations=np.load(path.with_suffix(".npy")))


def write_shown(path: Path, plan: Plan, seed: int) -> None:
    """Write for people which demonstrations each document was shown, a line for each document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{\n  "shots": {plan.shots},\n  "seed": {seed},\n  "demonstrations": [')
        for number, row in enumerate(plan.demonstrations):
            file.write(("," if number else "") + "\n    " + json.dumps(row.tolist()))
        file.write("\n  ]\n}\n")
