"""Whole reports: two results directories with all columns of the paper, and what may go wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_page import Page, require_accessible, require_self_contained
from reporting_samples import make_column, make_comparison
from suite_samples import COLUMNS, make_world

from kuea_mllm.reporting.comparison import write_comparison_report
from kuea_mllm.reporting.results_report import write_results_report
from kuea_mllm.reporting.several import differences_table
from kuea_mllm.reporting.view import parse_comparison

HOSTILE = '</bdi></td><script>alert(1)</script><svg onload="x()">\x00\ud800\u202eevil\U0001f388'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pair_text(world: tuple[Path, Path, dict[str, Any]]) -> str:
    baseline, candidate, comparison = world
    path = baseline.parent / "pair.html"
    seeds = {"count": 3, "differences": [0.01, 0.02, 0.0], "std": 0.01, "low": -0.01, "high": 0.03}
    comparison["columns"]["kuea_paper_pope"]["seeds"] = seeds
    write_comparison_report(path, comparison=comparison, baseline=baseline, candidate=candidate)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def other_texts(world: tuple[Path, Path, dict[str, Any]]) -> dict[str, str]:
    baseline, _, comparison = world
    second = json.loads(json.dumps(comparison))
    second["candidate"]["model"]["name"] = "another"
    several = {"kind": "comparisons", "schema_version": 1, "pairs": [comparison, second]}
    write_comparison_report(baseline.parent / "several.html", comparison=several)
    write_results_report(baseline.parent / "one.html", baseline)
    return {
        name: (baseline.parent / f"{name}.html").read_text(encoding="utf-8")
        for name in ("several", "one")
    }


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def test_sections_come_in_the_order_of_questions_about_them(pair_text: str) -> None:
    assert headings(pair_text) == [
        "Scores",
        "Beside the paper&#39;s numbers",
        "Spread between seeds",
        "Parts of columns",
        "Flipped questions",
        "What was asked",
        "The two models",
        "Where this comes from",
    ]


def test_reports_are_accessible_and_load_nothing(
    pair_text: str, other_texts: dict[str, str]
) -> None:
    for text in (pair_text, *other_texts.values()):
        page = Page(text)
        require_accessible(page)
        require_self_contained(text, page)


def test_columns_carry_the_names_of_the_paper(pair_text: str) -> None:
    rows = Page(pair_text).cells
    assert [row[0] for row in rows[1 : len(COLUMNS) + 1]] == [column[1] for column in COLUMNS]


def test_paper_stands_beside_ours(pair_text: str) -> None:
    (row,) = [row for row in Page(pair_text).cells if row[0] == "paper: ViT-L-336 +both"]
    assert row[-2:] == ["34.00", "61.70"]
    assert "For orientation only" in pair_text


def test_differences_between_models_are_marked(pair_text: str) -> None:
    rows = {row[0]: row[1:] for row in Page(pair_text).cells}
    assert rows["Fingerprint of the vision tower in use"][0] == "≠ differs"
    assert rows["Tower: teacher"] == ["≠ differs", "–", "facebook/dinov2-large"]  # noqa: RUF001
    assert rows["LoRA: rank"][2] == "128"
    assert rows["Adapter"][0] == "same"


def test_flips_can_be_filtered_without_a_program(pair_text: str) -> None:
    page = Page(pair_text)
    radios = [a for a in page.all("input") if a["type"] == "radio"]
    groups = {str(a["name"]) for a in radios}
    assert groups == {"flips-column", "flips-direction"}
    for name in groups:
        assert sum("checked" in a for a in radios if a["name"] == name) == 1
    shown = [
        a for tag, a in page.tags if tag == "section" and "flips-column" in str(a.get("class"))
    ]
    for number in range(1, len(shown) + 1):
        assert f"flips-{number}" in {a.get("id") for a in radios}
        assert f"#flips-{number}:checked) > .flips-column:not(.c{number})" in pair_text


def test_boxes_are_drawn_and_named(pair_text: str) -> None:
    page = Page(pair_text)
    roles = {str(a["class"]) for a in page.all("rect")}
    assert {"expected", "baseline", "candidate", "halo expected"} <= roles
    drawn = [a for a in page.all("rect") if a["class"] == "expected"]
    assert {(a["x"], a["y"], a["width"], a["height"]) for a in drawn} == {
        ("220.0", "200.0", "360.0", "640.0")
    }
    assert "IoU 0.83" in page.text and "IoU 0.08" in page.text


def test_judged_answers_show_their_points(pair_text: str) -> None:
    assert "8 of 10, reference 8.5" in Page(pair_text).text


def test_several_candidates_share_one_table(other_texts: dict[str, str]) -> None:
    page = Page(other_texts["several"])
    assert page.cells[0][2:] == ["llava-1.5-7b-kuea-lora", "another"]
    assert page.cells[1][0] == "AI2D" and len(page.cells[1]) == 4
    assert headings(other_texts["several"])[0] == "Scores"


def test_several_candidates_are_shown_by_the_mean_of_their_seeds(
    world: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, candidate, comparison = world
    task, part = "kuea_paper_pope", "popular"
    runs = [candidate, tmp_path / "second"]
    runs[1].mkdir()
    summary = json.loads((candidate / "summary.json").read_text())
    entry = summary["columns"][task]
    scores = [entry["breakdown"][part], entry["score"]]
    entry["breakdown"][part] = scores[0] - 0.5
    entry["score"] = scores[1] - 0.5
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    seeded = json.loads(json.dumps(comparison))
    seeded["candidate"] |= {"label": "seeded", "runs": [{"path": str(run)} for run in runs]}
    several = {"kind": "comparisons", "schema_version": 1, "pairs": [comparison, seeded]}
    write_comparison_report(tmp_path / "several.html", comparison=several)
    page = Page((tmp_path / "several.html").read_text(encoding="utf-8"))
    (row,) = [row for row in page.cells if row[0] == f"pope: {part}"]
    assert float(row[2]) - float(row[3]) == pytest.approx(25, abs=0.02)
    ours = {row[0]: row for row in page.cells if row[0].endswith("(ours)")}
    (place,) = {row.index("pope") for row in page.cells if row[0] == "Model" and "pope" in row}
    gap = float(ours[f"{candidate.name} (ours)"][place]) - float(ours["seeded (ours)"][place])
    assert gap == pytest.approx(25, abs=0.02)
    assert page.text.count("Mean over the runs of a model, where it has several: seeded (2).") == 2
    assert "Of the first run of a model, where it has several: seeded (2)." in page.text
    assert "seeded, run 2" in page.text


def test_one_run_of_each_model_is_no_mean(other_texts: dict[str, str]) -> None:
    assert "where it has several" not in Page(other_texts["several"]).text


def test_one_model_shows_wrong_answers_first(other_texts: dict[str, str]) -> None:
    page = Page(other_texts["one"])
    assert page.text.count("Wrong or partly wrong") > 5
    assert "Answers and their scores" in page.text
    assert "Questions to look at" in page.text


def test_missing_column_says_why_and_is_no_zero(
    world: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    baseline, candidate, comparison = world
    task = "kuea_paper_llava_wild"
    changed = json.loads(json.dumps(comparison))
    nothing = {"baseline": None, "candidate": None, "difference": None, "low": None, "high": None}
    flips = {"count": 0, "doc_ids": []}
    changed["columns"][task] |= nothing | {
        "paired": False,
        "missing": "no judge was given",
        "improved": flips,
        "worsened": flips,
    }
    write_comparison_report(
        tmp_path / "r.html", comparison=changed, baseline=baseline, candidate=candidate
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    (row,) = [row for row in page.cells if row[0] == "llava-wild"][:1]
    assert row[1:5] == ["○ missing", "n/a", "n/a", "n/a"]
    assert "llava-wild is missing: no judge was given" in page.text


def test_five_thousand_hostile_flips_stay_small_and_harmless(tmp_path: Path) -> None:
    count = 5_000
    runs = [tmp_path / "a", tmp_path / "b"]
    for side, run in enumerate(runs):
        (run / "samples").mkdir(parents=True)
        entry = {"task": "gqa", "score": 0.5, "n": count, "samples": "samples/gqa.jsonl"}
        summary = {"model": {"name": run.name}, "settings": {}, "columns": {"gqa": entry}}
        (run / "summary.json").write_text(json.dumps(summary))
        long = HOSTILE + "x" * 2_000
        rows = [
            {
                "doc_id": number,
                "cluster": str(number),
                "question": long,
                "target": HOSTILE,
                "answer": long if number else HOSTILE * 20_000,
                "score": float(number % 2 == side),
                "failed": False,
                "image": f"/gone/{number}.jpg",
            }
            for number in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "samples" / "gqa.jsonl").write_text(text)
    moved = {
        key: {"count": count // 2, "doc_ids": list(range(first, count, 2))}
        for key, first in (("improved", 1), ("worsened", 0))
    }
    comparison = make_comparison(make_column("gqa", **moved))
    path = tmp_path / "r.html"
    write_comparison_report(path, comparison=comparison, baseline=runs[0], candidate=runs[1])
    assert path.stat().st_size < 2_000_000
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    require_accessible(page)
    require_self_contained(text, page)
    assert "<script>alert(1)</script>" in page.text
    assert not {"\x00", "\ud800"} & set(text)
    assert "characters in all" in page.text
    assert "2,392 more are in samples/gqa.jsonl" in page.text
    assert re.search(r"file /gone/\d+\.jpg is not on this machine", page.text)


def test_other_baseline_of_a_candidate_is_shown(
    world: tuple[Path, Path, dict[str, Any]],
) -> None:
    first = parse_comparison(world[2])
    changed = json.loads(json.dumps(world[2]))
    # This candidate left questions of one column unanswered, which are left out for both.
    changed["columns"]["kuea_paper_pope"]["baseline"] = 0.125
    table = differences_table([first, parse_comparison(changed)])
    rows = {str(row[0]): row for row in table.rows}
    same, other = (getattr(cell, "text", cell) for cell in rows["pope"][2:])
    assert "from" not in same and other.endswith(", from 12.5")
    assert "the baseline's score on the questions" in table.caption
    assert not any("from" in getattr(cell, "text", "") for cell in rows["AI2D"])


def test_totals_have_no_bar_among_percentages(tmp_path: Path) -> None:
    columns = {
        "mme": {"task": "mme", "metric": "score", "score": 1481.2, "n": 9, "failed": 0},
        "pope": {"task": "pope", "metric": "f1", "score": 0.861, "n": 9, "failed": 0},
    }
    summary = {"model": {"name": "m"}, "settings": {}, "columns": columns}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    write_results_report(tmp_path / "r.html", tmp_path)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    (alt,) = [str(image["alt"]) for image in page.all("img")]
    assert alt == "Bars of the scores. pope: m 86.1."
    assert "Not drawn (missing, or a total): mme." in page.text
    assert ["mme", "1,481.2"] in [row[:2] for row in page.cells]


def test_many_parts_are_folded_by_column(tmp_path: Path) -> None:
    parts = {f"class {number}": 0.5 for number in range(1_000)}
    entry = {"task": "imagenet", "metric": "acc1", "score": 0.5, "n": 5000, "failed": 0}
    summary = {
        "model": {"name": "m"},
        "settings": {},
        "columns": {"imagenet": entry | {"breakdown": parts}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    write_results_report(tmp_path / "r.html", tmp_path)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    require_accessible(page)
    assert "<summary>imagenet: 1000 parts</summary>" in text
    assert ["imagenet: class 999", "50.0"] in page.cells
