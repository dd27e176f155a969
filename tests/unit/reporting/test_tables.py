from __future__ import annotations

import io
from typing import Any

import pytest
from reporting_samples import full_comparison, make_column, make_comparison, make_summary
from rich.console import Console

from kuea_mllm.reporting import tables


def render(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


NUMBERS = [
    "41.2",
    "44.6",
    "+3.4 [1.2, 5.6]",
    "0.004",
    "-2.6 [-4.1, -1.1]",
    "<0.001",
    "9,000",
    "1,481.2",
    "+14.7",
    "+0.3 [-0.6, 1.2]",
]


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_table_shows_every_number(width: int) -> None:
    text = render(tables.comparison_table(full_comparison()), width)
    for number in NUMBERS:
        assert number in text
    for name in (
        "metric",
        "baseline",
        "candidate",
        "difference",
        "95 % interval",
        "Holm",
        "verdict",
    ):
        assert name in text
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_comparison_table_keeps_long_numbers_at_80_columns() -> None:
    column = make_column(
        "a_task_with_a_really_long_name_that_must_be_folded",
        "a_metric_with_a_long_name",
        n=1234567,
        baseline=1.0,
        candidate=0.0,
        difference=-1.0,
        low=-1.0,
        high=-0.999,
    )
    text = render(tables.comparison_table(make_comparison(column)))
    for number in ("-100.0 [-100.0, -99.9]", "1,234,567", "100.0", "0.004", "better"):
        assert number in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("width", "lines"), [(80, 1), (79, 2), (60, 2)])
def test_verdict_is_in_one_line_where_there_is_room(width: int, lines: int) -> None:
    column = make_column(
        "RefCOCOg",
        "acc_at_iou_0.5",
        n=214_354,
        difference=-0.1,
        low=-0.218,
        high=0.218,
        verdict="cannot tell",
    )
    text = render(tables.comparison_table(make_comparison(column)), width)
    assert ("cannot tell" in text) == (lines == 1)
    assert ("acc_at_iou_0.5" in text) or width < 80
    assert max(map(len, text.splitlines())) <= width


def test_note_that_columns_share_is_said_once() -> None:
    notes = {"pope": "only 12 clusters: the interval is rough.", "vsr": "", "mme": "another."}
    columns = [make_column(name, note=note) for name, note in notes.items()]
    shared = [make_column(name, note=notes["pope"]) for name in ("ai2d", "gqa")]
    text = " ".join(render(tables.comparison_text(make_comparison(*columns, *shared))).split())
    assert "Note: Only 12 clusters: the interval is rough (pope, ai2d, gqa). Note: mme:" in text
    assert text.count("interval is rough") == 1


def test_note_on_all_columns_does_not_list_them() -> None:
    note = "nothing changed."
    columns = [make_column(name, note=note) for name in "abcd"]
    text = " ".join(render(tables.comparison_text(make_comparison(*columns))).split())
    assert text.count("Note: all 4 columns: nothing changed.") == text.count("changed.") == 1
    text = " ".join(render(tables.comparison_text(make_comparison(*columns[:3]))).split())
    assert "Note: Nothing changed (a, b, c)." in text


def test_columns_that_lack_a_score_for_one_reason_are_named_together() -> None:
    columns = [
        make_column(name, paired=False, missing="no judge", reason="x") for name in ("wild", "coco")
    ]
    text = render(tables.comparison_text(make_comparison(*columns, make_column("gqa"))))
    assert "Note: wild, coco are missing: no judge" in text


def test_comparison_text_begins_with_the_finding() -> None:
    text = render(tables.comparison_text(full_comparison()))
    assert text.startswith("1 column cannot be told apart, 1 is better")
    assert "does not mean equal" in text


def test_names_are_not_read_as_markup_or_escapes() -> None:
    comparison = make_comparison(make_column("[bold]x[/bold]\x1b[31m"))
    text = render(tables.comparison_text(comparison), 120)
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text


def test_summary_table_shows_scores_in_percent() -> None:
    text = render(tables.summary_table(make_summary()))
    for part in ("llava-stock", "12,800", "41.2", "1.2", "2"):
        assert part in text


def test_key_values_panel_folds_long_values() -> None:
    text = render(tables.key_values("Run", [("steps", 20000), ("fingerprint", "f" * 100)]))
    assert "20,000" in text
    assert text.count("f" * 10) and text.count("f") >= 100


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_comparison(full_comparison())
    tables.print_summary(make_summary())
    tables.print_key_values("machine", {"cores": 2})
    printed = capsys.readouterr().out
    assert "cannot be told apart" in printed
    assert "Results of llava-stock" in printed
    assert "cores  2" in printed
