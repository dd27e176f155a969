"""Which demonstrations each document of one task is shown, as a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

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
        demonstrations: For each document the numbers of its demonstrations, in their order.
        passes_images: Whether the images of the demonstrations are passed to the model.
    """

    style: Style
    shots: int
    documents: str
    pool: str
    demonstrations: list[list[int]]
    passes_images: bool


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan."""
    write_json(path, asdict(plan))


def read_plan(path: Path) -> Plan:
    """Read a plan back."""
    return Plan(**read_json(path))
