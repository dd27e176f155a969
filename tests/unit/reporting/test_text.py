from __future__ import annotations

import math

import pytest

from kuea_mllm.reporting import text


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.4231, "42.3"), (1.0, "100.0"), (-0.0001, "0.0"), (None, "n/a"), (math.nan, "n/a")],
)
def test_percent_has_one_decimal(fraction: float | None, shown: str) -> None:
    assert text.percent(fraction) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0.034, "+3.4"), (-0.0261, "-2.6"), (-0.0001, "+0.0")]
)
def test_points_are_signed(fraction: float, shown: str) -> None:
    assert text.points(fraction) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0004, "<0.001"), (0.004, "0.004"), (1.0, "1.000"), (None, "n/a")]
)
def test_p_value_has_three_decimals(value: float | None, shown: str) -> None:
    assert text.p_value(value) == shown


def test_clean_removes_what_controls_terminals_and_keeps_the_rest() -> None:
    assert text.clean("a\x1b[31mb\x00\ud800\r\nc\td é 🎈") == "a�[31mb��\nc\td é 🎈"


def test_clean_text_can_be_encoded() -> None:
    assert text.clean("\udfff").encode()


def test_shorten_tells_the_full_length() -> None:
    assert text.shorten("a" * 1000, 10) == ("a" * 10, 1000)
    assert text.shorten("abc", 10) == ("abc", None)


def test_value_text_of_nested_values() -> None:
    assert text.value_text({"steps": 20000, "on": True, "lr": 1e-5, "x": [1, None]}) == (
        "steps: 20,000, on: yes, lr: 1e-05, x: 1, n/a"
    )
