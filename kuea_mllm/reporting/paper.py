"""The paper's own numbers, to be shown beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from kuea_mllm.reporting.blocks import Cell, Paragraph, Section, Table
from kuea_mllm.reporting.paper_encoder import SUITE_PREFIX, encoder_section
from kuea_mllm.reporting.text import one_line

LLAVA, FLAMINGO = "llava-paper", "flamingo-paper"
_PAPER_PROTOCOLS = {"paper", "open-flamingo", "open-flamingo-released"}
_MMVP = "MMVP"
_MODELS_BY_SIZE = {224: "ViT-L", 336: "ViT-L-336"}
_FEWSHOT_NAMES = {
    "coco": "COCO",
    "flickr30k": "Flickr-30K",
    "vqav2": "VQAv2",
    "okvqa": "OK-VQA",
    "textvqa": "TextVQA",
    "vizwiz": "VizWiz",
    "hatefulmemes": "HatefulMemes",
}
_FEWSHOT_TASK = re.compile(r"(?P<data>[a-z0-9]+)_(?P<shots>\d+)shot(_seed\d+)?$")
# Tables 5 and 11 name the same models differently.
_TABLE_11_VARIANTS = {"CLIP": "baseline", "CLIP+align": "+align", "CLIP+align+peft": "+both"}


@dataclass(frozen=True)
class OwnScores:
    """Our scores of one model, for a row beside the paper's.

    Args:
        name: How the row is called.
        runs: `summary.json` of its results; scores of several seeds are averaged.
    """

    name: str
    runs: Sequence[Mapping[str, Any]]


def paper_section(models: Sequence[OwnScores]) -> Section | None:
    """Set our scores beside the paper's tables; None where the suite is not the paper's."""
    suites = {_suite(run) for model in models for run in model.runs}
    if all(suite is not None and suite.startswith(SUITE_PREFIX) for suite in suites):
        return encoder_section([(model.name, model.runs) for model in models])
    if suites == {LLAVA}:
        table = _llava_table(models)
    elif suites == {FLAMINGO}:
        table = _flamingo_table(models)
    else:
        return None
    return Section("Beside the paper's numbers", [Paragraph(_caution(models), "warning"), table])


@cache
def paper_tables() -> Mapping[str, Any]:
    """Return tables 5, 6, 11 and 13 of the paper by their numbers."""
    path = files("kuea_mllm.reporting") / "data" / "paper_tables.json"
    tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return tables


def _llava_table(models: Sequence[OwnScores]) -> Table:
    names = [*paper_tables()["5"]["columns"], _MMVP]
    rows: list[list[str | Cell]] = [
        [f"{model.name} (ours)", *_row(names, _llava_scores(model.runs), None)] for model in models
    ]
    sizes = {
        size for model in models for run in model.runs if (size := tower_size(run)) is not None
    }
    # Rows of the other resolution would only be in the way, where it is known which one is meant.
    left_out = {_MODELS_BY_SIZE[size] for size in _MODELS_BY_SIZE if sizes and size not in sizes}
    rows += [
        [label, *_row(names, values, average)]
        for model_name, label, values, average in _llava_paper()
        if model_name not in left_out
    ]
    return Table(
        caption="Tables 5, 11 (MMVP) and 13 of the paper, in percent, below our scores. The "
        "average covers the columns of Table 5 and is left out where one is missing.",
        header=("Model", *names, "Average"),
        rows=rows,
        numeric=frozenset(range(1, len(names) + 2)),
    )


def _llava_paper() -> list[tuple[str, str, dict[str, float], float | None]]:
    tables = paper_tables()
    pairs = {
        _TABLE_11_VARIANTS[row["variant"]]: row["values"]["Accuracy"]
        for row in tables["11"]["rows"]
    }
    found = []
    for row in tables["5"]["rows"]:
        values = dict(row["values"])
        if row["model"] == "ViT-L-336" and row["variant"] in pairs:
            values[_MMVP] = pairs[row["variant"]]
        label = f"paper: {row['model']} {row['variant']}"
        found.append((row["model"], label, values, row["average"]))
    for row in tables["13"]["rows"]:
        label = f"paper, Table 13: {row['variant']}"
        found.append((row["model"], label, row["values"], row["average"]))
    return found


def _llava_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs:
        for entry in run["columns"].values():
            score = _in_percent(entry)
            # A task beside the suite may be called as a column of it: `--tasks pope`.
            if score is not None and entry.get("suite", LLAVA) == LLAVA:
                found.setdefault(one_line(entry.get("column") or entry["task"]), []).append(score)
    return {name: fmean(scores) for name, scores in found.items()}


def _flamingo_table(models: Sequence[OwnScores]) -> Table:
    names = paper_tables()["6"]["columns"]
    rows: list[list[str | Cell]] = []
    for shots in sorted({shots for model in models for shots, _ in _fewshot_scores(model.runs)}):
        for model in models:
            values = {
                name: score
                for (number, name), score in _fewshot_scores(model.runs).items()
                if number == shots
            }
            rows.append([f"{model.name} (ours)", str(shots), *_row(names, values, None)])
        rows += [
            [
                f"paper: {row['variant']}",
                str(shots),
                *_row(names, row["values"], row["average"]),
            ]
            for row in paper_tables()["6"]["rows"]
            if row["shots"] == shots
        ]
    return Table(
        caption="Table 6 of the paper (OpenFlamingo-3B Instruct) below our scores: CIDEr for COCO "
        "and Flickr-30K, VQA accuracy, ROC-AUC for HatefulMemes. The average is left out where "
        "a column is missing.",
        header=("Model", "Shots", *names, "Average"),
        rows=rows,
        numeric=frozenset(range(1, len(names) + 3)),
    )


def _fewshot_scores(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """Return the mean over runs and trials by number of shots and name of the data set."""
    found: dict[tuple[int, str], list[float]] = {}
    for run in runs:
        for task, entry in run["columns"].items():
            match = _FEWSHOT_TASK.search(str(task))
            score = _in_percent(entry)
            if match and score is not None and match["data"] in _FEWSHOT_NAMES:
                key = int(match["shots"]), _FEWSHOT_NAMES[match["data"]]
                found.setdefault(key, []).append(score)
    return {key: fmean(scores) for key, scores in found.items()}


def _row(
    names: Sequence[str], values: Mapping[str, float], average: float | None
) -> list[str | Cell]:
    averaged = [name for name in names if name != _MMVP]
    if average is None and all(name in values for name in averaged):
        average = sum(values[name] for name in averaged) / len(averaged)
    numbers = [*(values.get(name) for name in names), average]
    return ["–" if number is None else f"{number:.2f}" for number in numbers]  # noqa: RUF001


def _in_percent(entry: Mapping[str, Any]) -> float | None:
    score = entry.get("score")
    return None if score is None else 100.0 * float(score) / float(entry.get("scale") or 1)


def _caution(models: Sequence[OwnScores]) -> str:
    """Say why our scores and the paper's are not of one kind."""
    settings = [run["settings"] for model in models for run in model.runs]
    why = ["the models are other files than the paper's"]
    protocols = sorted({str(values.get("protocol") or "not stated") for values in settings})
    if set(protocols) - _PAPER_PROTOCOLS:
        why.append(f"the protocol here is “{one_line(', '.join(protocols))}”, not the paper's")
    limits = sorted({int(values["limit"]) for values in settings if values.get("limit")})
    if limits:
        counts = ", ".join(map(str, limits))
        why.append(f"at most {counts} questions of each data set were asked here")
    why.append("the paper gives no intervals")
    return f"For orientation only: {'; '.join(why)}."


def tower_size(summary: Mapping[str, Any]) -> int | None:
    """Return the image size of a model's tower, where its record tells."""
    found: Any = summary
    for key in ("model_record", "tower", "spec", "image_size"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) else None


def _suite(summary: Mapping[str, Any]) -> str | None:
    suite = summary["settings"].get("suite")
    return None if suite is None else str(suite)
