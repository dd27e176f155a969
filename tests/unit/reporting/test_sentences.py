from __future__ import annotations

from reporting_samples import AVERAGE, NULL, make_column, make_comparison

from kuea_mllm.reporting.sentences import average_sentence, headline
from kuea_mllm.reporting.view import parse_comparison

WORSE_AVERAGE = AVERAGE | {"difference": -0.02, "low": -0.03, "high": -0.01, "verdict": "worse"}


def test_headline_names_an_average_that_says_more_than_its_columns() -> None:
    columns = [make_column(name, **NULL) for name in "ab"]
    view = parse_comparison(make_comparison(*columns, average=WORSE_AVERAGE))
    assert headline(view) == (
        "No difference could be shown in any of the 2 columns tested by itself, but their average "
        "is worse (-2.0 [-3.0, -1.0] points)."
    )


def test_average_without_judged_columns_is_said_too() -> None:
    view = parse_comparison(make_comparison(make_column("a"), average_unjudged=WORSE_AVERAGE))
    assert average_sentence(view) == (
        "Average over the columns: +0.3 [-0.6, 1.2] points, cannot be told apart. "
        "Without those that a judge scored: -2.0 [-3.0, -1.0] points, worse."
    )


def test_no_average_gives_no_sentence() -> None:
    assert average_sentence(parse_comparison(make_comparison(average=None))) == ""
