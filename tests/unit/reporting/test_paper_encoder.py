from __future__ import annotations

from typing import Any

import pytest

from kuea_mllm.reporting.blocks import Paragraph, Table
from kuea_mllm.reporting.paper import OwnScores, paper_section
from kuea_mllm.reporting.paper_encoder import encoder_tables, paper_model

L_14 = {"family": "clip", "width": 1024, "patch_size": 14, "image_size": 224}


def make_summary(
    columns: dict[str, float], *, suite: str = "zero-shot", table: int | None = 1, **model: Any
) -> dict[str, Any]:
    expected = [{"column": "svhn", "table": table, "by": "paper", "scores": {"ViT-L-14": 1.0}}]
    return {
        "model": {"path": "runs/mine/tower", "tower": L_14, **model},
        "settings": {"suite": f"probe-{suite}", "limit": None},
        "columns": {
            name: {
                "task": name,
                "column": name,
                "suite": f"probe-{suite}",
                "score": score / 100,
                "scale": 1,
                "expected": expected,
            }
            for name, score in columns.items()
        },
    }


def tables_of(*summaries: dict[str, Any]) -> list[Table]:
    section = paper_section([OwnScores("mine", summaries)])
    assert section is not None
    return [block for block in section.blocks if isinstance(block, Table)]


def rows_of(table: Table) -> dict[str, list[str]]:
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows}


# Of the printed averages, those that are not the mean of the printed values.
NOT_EXPLAINED = {("1", "ViT-L-14-336", "kernel"), ("9", "ViT-L-14", "+align")}


@pytest.mark.parametrize("number", ["1", "8", "9", "12", "14"])
def test_printed_averages_are_those_of_the_printed_values(number: str) -> None:
    table = encoder_tables()[number]
    for row in table["rows"]:
        assert list(row["values"]) == table["columns"]
        mean = sum(row["values"][name] for name in table["average_covers"]) / 11
        is_explained = (number, row["model"], row["variant"]) not in NOT_EXPLAINED
        assert (abs(mean - row["average"]) < 0.011) == is_explained


def test_our_scores_stand_above_those_of_the_same_tower() -> None:
    covered = encoder_tables()["1"]["average_covers"]
    [table] = tables_of(make_summary(dict.fromkeys(covered, 60.0) | {"CIFAR10": 71.0}))
    rows = rows_of(table)
    assert next(iter(rows)) == "mine (ours)"
    assert rows["mine (ours)"][:2] == ["–", "71.00"]  # noqa: RUF001
    assert rows["mine (ours)"][-1] == "61.00"
    assert rows["paper: ViT-L-14 kernel"][-1] == "66.54"
    assert "paper, Table 9: ViT-L-14 +align" in rows
    assert "paper, Table 14: ViT-L-14 25%" in rows
    # Table 14's first and last rows are rows of Table 1.
    assert "paper, Table 14: ViT-L-14 100%" not in rows
    assert not any("ViT-B-16" in label for label in rows)


def caution_of(*summaries: dict[str, Any]) -> str:
    section = paper_section([OwnScores("mine", summaries)])
    assert section is not None
    [caution] = [block for block in section.blocks if isinstance(block, Paragraph)]
    return str(caution.text)


def test_data_sets_of_another_size_are_named_once() -> None:
    sizes = {
        "CIFAR10": {"documents": 10_000, "documents_found": 60},
        "DTD": {"documents": 1880, "documents_found": 1880},
        "svhn": {"documents": 9, "documents_found": 9, "train_documents": 8},
    }
    sizes["svhn"]["train_documents_found"] = 7
    summary = make_summary(dict.fromkeys(sizes, 50.0))
    for name, known in sizes.items():
        summary["columns"][name] |= {"dataset": name, **known}
    told = "data sets are not of the published size here"
    named = f"{told}: CIFAR10 (60 of 10,000), svhn (7 of 8 to train on);"
    assert named in caution_of(summary, summary)
    # Results of earlier versions do not say.
    assert told not in caution_of(make_summary({"CIFAR10": 50.0}))


def test_unknown_tower_is_set_beside_all() -> None:
    [table] = tables_of(make_summary({"CIFAR10": 50.0}, tower={}))
    labels = rows_of(table)
    assert {"paper: ViT-B-16 CLIP", "paper, Table 8: DFN +align"} <= set(labels)


def test_linear_probes_stand_beside_zero_shot_in_table_3() -> None:
    [table] = tables_of(make_summary({"svhn": 50.0, "svhn linear": 60.0}, suite="linear", table=3))
    rows = rows_of(table)
    assert rows["mine (ours)"][::4] == ["50.00", "60.00"]
    assert rows["paper: ViT-L-14 baseline"][::4] == ["57.02", "65.20"]


def test_patterns_of_mmvp_vlm_are_columns() -> None:
    summary = make_summary({"MMVP-VLM": 20.0}, suite="mmvp-vlm", table=10)
    summary["columns"]["MMVP-VLM"]["breakdown"] = {"text": 0.4}
    [table] = tables_of(summary)
    assert rows_of(table)["mine (ours)"][table.header.index("text") - 1] == "40.00"


def test_runs_are_averaged() -> None:
    [table] = tables_of(make_summary({"CIFAR10": 50.0}), make_summary({"CIFAR10": 60.0}))
    assert rows_of(table)["mine (ours)"][1] == "55.00"


def test_data_sets_of_an_own_recipe_are_not_the_papers() -> None:
    own = make_summary({"CIFAR10": 50.0}, table=None)
    assert paper_section([OwnScores("mine", [own])]) is None


def test_scores_by_others_are_shown() -> None:
    summary = make_summary({"CIFAR10": 50.0})
    summary["columns"]["CIFAR10"]["expected"].append(
        {"column": "CIFAR10", "table": None, "by": "CLIP_benchmark", "scores": {"ViT-L-14": 95.69}}
    )
    assert rows_of(tables_of(summary)[0])["CLIP_benchmark: ViT-L-14"][1] == "95.69"


@pytest.mark.parametrize(
    ("path", "tower", "expected"),
    [
        ("runs/a/tower", L_14, "ViT-L-14"),
        ("runs/a/tower", {**L_14, "image_size": 336}, "ViT-L-14-336"),
        ("models/DFN2B-CLIP-ViT-L-14", L_14, "DFN"),
        ("google/siglip-so400m-patch14-384", {}, "SigLIP"),
        ("runs/a/tower", {**L_14, "width": 64}, None),
    ],
)
def test_towers_are_recognised(path: str, tower: dict[str, Any], expected: str | None) -> None:
    assert paper_model({"model": {"path": path, "tower": tower}}) == expected


def test_aligned_tower_goes_by_what_it_was_made_from() -> None:
    record = {"base_tower": {"reference": "facebook/metaclip-l14-400m"}}
    summary = {"model": {"path": "runs/a", "tower": L_14}, "model_record": record}
    assert paper_model(summary) == "MetaCLIP"
