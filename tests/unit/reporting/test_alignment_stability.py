"""The list of healthy ranges: complete, checked, and the same in the documentation."""

from __future__ import annotations

from pathlib import Path

from alignment_samples import AFTER, BEFORE, metric_rows

from kuea_mllm.reporting.stability import GAUGES, measured_gauges, stability_markdown

DOCUMENT = Path(__file__).parents[3] / "docs" / "stability.md"


def test_document_holds_the_same_list() -> None:
    # To write it anew: Path("docs/stability.md").write_text(stability_markdown())
    assert DOCUMENT.read_text(encoding="utf-8") == stability_markdown()


def test_every_logged_number_is_in_the_list() -> None:
    listed = {key.strip() for gauge in GAUGES for key in gauge.metric.split(",")}
    explained_by_another = {
        "step",
        "loss",
        "kernel_gamma",
        "kernel_coef0",
        "heldout_drift_distance_mean",
        "heldout_drift_distance_max",
        "heldout_drift_bound_max",
    }
    logged = {key for row in metric_rows() for key in row}
    assert logged - explained_by_another <= listed


def test_untouched_tower_passes_every_check_but_that_of_the_gap() -> None:
    failed = [
        gauge.metric
        for gauge in measured_gauges(BEFORE)
        if gauge.check and not gauge.check(BEFORE, BEFORE)
    ]
    assert failed == ["heldout_kernel_gap, heldout_kernel_gap_original"]
    assert all(gauge.check(BEFORE, AFTER) for gauge in measured_gauges(BEFORE) if gauge.check)


def test_only_what_was_measured_is_checked() -> None:
    first = {name: value for name, value in BEFORE.items() if name != "heldout_zero_shot"}
    assert len(measured_gauges(first)) == len(measured_gauges(BEFORE)) - 1
