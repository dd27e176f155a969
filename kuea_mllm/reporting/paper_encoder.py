"""The paper's tables about the tower alone, to be shown beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from kuea_mllm.reporting.blocks import Block, Cell, Paragraph, Section, Table
from kuea_mllm.reporting.text import one_line

SUITE_PREFIX = "probe-"
_AVERAGE = "Average"
_LINEAR = "linear probe"
# (family, width, patch, size) of the towers that the paper's tables name.
_MODELS = {
    ("clip", 768, 16, 224): "ViT-B-16",
    ("clip", 1024, 14, 224): "ViT-L-14",
    ("clip", 1024, 14, 336): "ViT-L-14-336",
}
# Towers of Table 8, which look like others: what their names have in them.
_BY_NAME = {"siglip": "SigLIP", "dfn": "DFN", "metaclip": "MetaCLIP"}


@dataclass(frozen=True)
class _PaperTable:
    """Tables of the paper that have their columns in common."""

    numbers: tuple[str, ...]
    columns: tuple[str, ...]
    covered: tuple[str, ...]  # by the average; empty without one
    remark: str = ""


Row = tuple[str, str, Mapping[str, float], float | None]
"""Model, label, values, printed average."""


@cache
def encoder_tables() -> Mapping[str, Any]:
    """Return tables 1 to 4, 8 to 10, 12 and 14 of the paper by their numbers."""
    path = files("kuea_mllm.reporting") / "data" / "paper_encoder_tables.json"
    tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return tables


def encoder_section(
    models: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
) -> Section | None:
    """Set our scores beside the paper's tables.

    Args:
        models: Name and `summary.json` of the runs of each tower; runs are averaged.

    Returns:
        None if no table has a column that was scored here.
    """
    own = [(name, _scores(runs)) for name, runs in models]
    known = {name for _, runs in models for run in runs if (name := paper_model(run))}
    tables = [
        found
        for table in _tables()
        if (found := _table(table, own, known, [run for _, runs in models for run in runs]))
    ]
    if not tables:
        return None
    caution = Paragraph(_caution([run for _, runs in models for run in runs]), "warning")
    blocks: list[Block] = [caution, *tables]
    return Section("Beside the paper's numbers", blocks)


def paper_model(summary: Mapping[str, Any]) -> str | None:
    """Return what the paper calls a tower, by its name and sizes; None if it is none of those."""
    model = summary.get("model") or {}
    record = summary.get("model_record")
    start = record.get("base_tower") if isinstance(record, Mapping) else None
    told = [model.get("path"), start.get("reference") if isinstance(start, Mapping) else None]
    text = " ".join(str(part) for part in told).lower()
    for part, name in _BY_NAME.items():
        if part in text:
            return name
    tower = model.get("tower") or {}
    sizes = tuple(tower.get(key) for key in ("family", "width", "patch_size", "image_size"))
    return _MODELS.get(sizes)  # type: ignore[arg-type]


def _tables() -> list[_PaperTable]:
    tables = encoder_tables()
    texts = tuple(tables["3"]["columns"])
    return [
        _PaperTable(
            ("1", "8", "9", "12", "14"),
            tuple(tables["1"]["columns"]),
            tuple(tables["1"]["average_covers"]),
            "The average leaves out ImageNet, of which the paper's values are over 5,000 images.",
        ),
        _PaperTable(
            ("2",),
            tuple(tables["2"]["columns"]),
            (),
            "The released code leaves images as they are (not normalised) and cuts captions to 77 "
            "characters; --compat released does the same.",
        ),
        _PaperTable(
            ("3",),
            (*texts, *(f"{name} linear" for name in texts)),
            (),
            "The released code trains the linear probes on normalised images and scores them on "
            "others; --compat released does the same.",
        ),
        _PaperTable(
            ("4",),
            tuple(tables["4"]["columns"]),
            (),
            "Published is the best of five epochs, chosen on the images that are scored; ours is "
            "the last one unless patch.selection is best.",
        ),
        _PaperTable(("10",), tuple(tables["10"]["columns"]), tuple(tables["10"]["average_covers"])),
    ]


def _paper_rows(table: _PaperTable) -> list[Row]:
    """Return the rows of some tables, those that a second one repeats only once."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    averages: dict[tuple[str, str], float | None] = {}
    for number in table.numbers:
        for row in encoder_tables()[number]["rows"]:
            values = dict(row["values"])
            if row.get("protocol") == _LINEAR:
                values = {f"{name} linear": value for name, value in values.items()}
            where = "paper" if number == table.numbers[0] else f"paper, Table {number}"
            key = row["model"], f"{where}: {row['model']} {row['variant']}"
            is_known = any(
                model == row["model"] and values.items() <= known.items()
                for (model, _), known in found.items()
            )
            if not is_known:
                found.setdefault(key, {}).update(values)
                averages[key] = row["average"]
    return [(model, label, found[model, label], averages[model, label]) for model, label in found]


def _table(
    table: _PaperTable,
    own: Sequence[tuple[str, Mapping[str, float]]],
    known: set[str],
    runs: Sequence[Mapping[str, Any]],
) -> Table | None:
    shown = [(name, scores) for name, scores in own if set(scores) & set(table.columns)]
    if not shown:
        return None
    lines: list[tuple[str, Mapping[str, float], float | None]] = [
        (f"{name} (ours)", scores, None) for name, scores in shown
    ]
    for model in sorted(known):
        lines += [
            (f"{by}: {model}", values, None) for by, values in _others(table, model, runs).items()
        ]
    # Rows of other towers would only be in the way, where it is known which one is meant.
    lines += [
        (label, values, average)
        for model, label, values, average in _paper_rows(table)
        if not known or model in known
    ]
    average_name = [_AVERAGE] if table.covered else []
    numbers = " and ".join(filter(None, [", ".join(table.numbers[:-1]), table.numbers[-1]]))
    return Table(
        caption=f"Table{'s' if len(table.numbers) > 1 else ''} {numbers} of the paper, in percent, "
        f"below our scores. {table.remark}".rstrip(),
        header=("Tower", *table.columns, *average_name),
        rows=[[label, *_row(table, values, average)] for label, values, average in lines],
        numeric=frozenset(range(1, len(table.columns) + len(average_name) + 1)),
    )


def _others(
    table: _PaperTable, model: str, runs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return what others than the paper published for the untouched tower, by their names."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        for entry in run["columns"].values():
            for expected in entry.get("expected") or ():
                score = expected["scores"].get(model)
                is_theirs = expected.get("table") is None and expected["column"] in table.columns
                if is_theirs and score is not None:
                    found.setdefault(one_line(expected["by"]), {})[expected["column"]] = score
    return found


def _scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return scores in percent by the paper's names: columns, and the patterns of MMVP-VLM."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for entry in run["columns"].values():
            # Data sets of an own recipe may have columns of the same name.
            if not any(expected.get("table") for expected in entry.get("expected") or ()):
                continue
            scale = float(entry.get("scale") or 1)
            parts = {str(entry.get("column")): entry.get("score")}
            if entry.get("suite") == f"{SUITE_PREFIX}mmvp-vlm":
                parts |= entry.get("breakdown") or {}
            for name, score in parts.items():
                if score is not None:
                    found.setdefault(name, []).append(100 * float(score) / scale)
    return {name: fmean(scores) for name, scores in found.items()}


def _row(
    table: _PaperTable, values: Mapping[str, float], average: float | None
) -> list[str | Cell]:
    if table.covered and average is None and all(name in values for name in table.covered):
        average = fmean(values[name] for name in table.covered)
    numbers = [values.get(name) for name in table.columns] + ([average] if table.covered else [])
    return ["–" if number is None else f"{number:.2f}" for number in numbers]  # noqa: RUF001


def _caution(runs: Sequence[Mapping[str, Any]]) -> str:
    """Say why our scores and the paper's are not of one kind."""
    why = ["the towers are other files than the paper's"]
    entries = [entry for run in runs for entry in run["columns"].values()]
    if any(entry.get("protocol") == "released" for entry in entries):
        why.append("some columns have the faults of the released evaluation (compat: released)")
    limits = sorted({str(run["settings"].get("limit")) for run in runs} - {"None"})
    if limits:
        why.append(f"at most {', '.join(limits)} images of each data set were used here")
    if sizes := _other_sizes(entries):
        why.append(f"data sets are not of the published size here: {', '.join(sizes)}")
    why.append("the paper gives no intervals")
    return f"For orientation only: {'; '.join(why)}."


def _other_sizes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the data sets of the paper that have another number of images here, each once."""
    found: dict[str, None] = {}
    for entry in entries:
        if not any(expected.get("table") for expected in entry.get("expected") or ()):
            continue
        for key, what in (("documents", ""), ("train_documents", " to train on")):
            # Earlier results do not say.
            here, published = entry.get(f"{key}_found"), entry.get(key)
            if here is not None and published is not None and here != published:
                name = one_line(str(entry.get("dataset")))
                found[f"{name} ({here:,} of {published:,}{what})"] = None
    return list(found)
