from __future__ import annotations

import pytest
from reporting_samples import (
    AVERAGE,
    NULL,
    UNPAIRED,
    WORSE,
    full_comparison,
    make_column,
    make_comparison,
)

from kuea_mllm.errors import EvaluationError
from kuea_mllm.reporting.sentences import average_sentence, headline, power_remark
from kuea_mllm.reporting.view import parse_comparison


def test_headline_names_what_changed_and_counts_the_rest() -> None:
    assert headline(parse_comparison(full_comparison())) == (
        "1 column cannot be told apart, 1 is better (miniworld_textvqa +3.4 [1.2, 5.6] points), "
        "1 is worse (pope -2.6 [-4.1, -1.1] points)."
    )


def test_headline_of_only_null_results_claims_nothing() -> None:
    view = parse_comparison(make_comparison(*(make_column(name, **NULL) for name in "abc")))
    assert headline(view) == "No difference could be shown in any of the 3 columns tested."


def test_headline_of_one_null_column_shows_its_interval() -> None:
    view = parse_comparison(make_comparison(make_column("gqa", **NULL)))
    assert headline(view) == (
        "No difference could be shown in the one column tested (gqa -0.7 [-3.1, 1.7] points)."
    )


def test_headline_of_one_better_column() -> None:
    view = parse_comparison(make_comparison(make_column("gqa")))
    assert headline(view) == "1 column is better (gqa +3.4 [1.2, 5.6] points)."


def test_headline_does_not_count_untested_columns() -> None:
    view = parse_comparison(make_comparison(make_column("mme", **UNPAIRED)))
    assert headline(view) == "Nothing was tested: none of the columns is paired."


def test_headline_without_columns() -> None:
    assert "Nothing was compared" in headline(parse_comparison(make_comparison()))


def test_headline_of_many_columns_stays_short() -> None:
    columns = [make_column(f"t{i}", difference=i / 100) for i in range(1, 9)]
    sentence = headline(parse_comparison(make_comparison(*columns)))
    assert sentence.startswith("8 columns are better (largest: t8 +8.0")
    assert "t5" not in sentence


def test_scores_on_a_scale_of_100_are_read_as_percent() -> None:
    (column,) = parse_comparison(make_comparison(make_column("pope", **WORSE))).columns
    assert (column.baseline_text, column.candidate_text) == ("86.1", "83.5")
    assert column.difference_text == "-2.6 [-4.1, -1.1]"


def test_totals_are_not_shown_as_percent() -> None:
    (column,) = parse_comparison(make_comparison(make_column("mme", **UNPAIRED))).columns
    assert (column.baseline_text, column.difference_text) == ("1,481.2", "+14.7")
    assert column.verdict == "not tested"


def test_column_without_scores_is_shown_as_such() -> None:
    empty = UNPAIRED | {"baseline": None, "candidate": None, "difference": None}
    (column,) = parse_comparison(make_comparison(make_column("gqa", **empty))).columns
    assert (column.baseline_text, column.candidate_text, column.difference_text) == ("n/a",) * 3


def test_power_remark_names_the_room_that_is_left() -> None:
    remark = power_remark(parse_comparison(make_comparison(make_column("gqa", **NULL))))
    assert "from -3.1 to +1.7 points" in remark
    assert "3.1 points or more" in remark


def test_power_remark_is_silent_when_all_is_told() -> None:
    assert power_remark(parse_comparison(make_comparison(make_column("gqa")))) == ""


def test_average_sentence() -> None:
    view = parse_comparison(full_comparison())
    assert "+0.3 [-0.6, 1.2] points, cannot be told apart" in average_sentence(view)
    assert average_sentence(parse_comparison(make_comparison(average=None))) == ""


def test_remarks_name_what_was_left_out() -> None:
    comparison = make_comparison(
        make_column("gqa", paired=False, reason="a total."),
        make_column("wild", column="llava-wild", paired=False, missing="no judge", reason="x"),
        warnings=["batch sizes differ"],
        only_in={"baseline": ["vqav2"], "candidate": []},
    )
    remarks = " ".join(parse_comparison(comparison).remarks)
    for part in (
        "batch sizes",
        "vqav2",
        "gqa is not paired: a total",
        "llava-wild is missing: no judge",
    ):
        assert part in remarks


def test_two_models_of_one_name_are_told_apart() -> None:
    side = {"path": "/r", "model": {"name": "llava"}}
    view = parse_comparison(make_comparison(baseline=side, candidate=side))
    assert view.baseline != view.candidate


def test_missing_key_is_named() -> None:
    comparison = full_comparison()
    del comparison["columns"]["pope"]["verdict"]
    with pytest.raises(EvaluationError, match="verdict"):
        parse_comparison(comparison)


def test_unknown_verdict_is_refused() -> None:
    with pytest.raises(EvaluationError, match="superb"):
        parse_comparison(make_comparison(make_column("gqa", verdict="superb")))


def test_columns_go_by_the_names_of_the_paper() -> None:
    columns = (
        make_column("kuea_paper_pope", column="pope", protocol="paper"),
        make_column("pope", column="pope", protocol="lmms-eval"),
        make_column("kuea_paper_vsr", column="vsr", protocol="paper"),
    )
    view = parse_comparison(make_comparison(*columns))
    assert [column.task for column in view.columns] == ["pope (paper)", "pope (lmms-eval)", "vsr"]


def test_scores_of_a_suite_are_percent_even_above_100() -> None:
    column = make_column("c", suite="flamingo-paper", scale=100, baseline=104.0, candidate=101.0)
    (found,) = parse_comparison(make_comparison(column)).columns
    assert (found.baseline_text, found.is_share) == ("104.0", True)


def test_labels_and_both_averages_are_shown() -> None:
    side = {"path": "/r", "label": "stock", "model": {"name": "llava"}}
    comparison = make_comparison(
        baseline=side, average_unjudged=AVERAGE, averages={"4 shots": AVERAGE}
    )
    view = parse_comparison(comparison)
    assert view.baseline == "stock"
    names = ["average, 4 shots", "average", "without judged"]
    assert [row.task for row in view.rows] == names
