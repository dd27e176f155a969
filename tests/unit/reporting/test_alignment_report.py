"""Figures on disk and the report of one alignment run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from alignment_samples import AFTER, BEFORE, MANIFEST, POLYNOMIAL, write_run

from kuea_mllm.reporting.alignment import (
    alignment_report,
    alignment_section,
    draw_alignment_figures,
    print_alignment_result,
)
from kuea_mllm.reporting.blocks import Figure, Table
from kuea_mllm.reporting.html import render_html

FIGURES = [
    "drift",
    "heldout_gap",
    "kernel_differences",
    "kernel_matrices",
    "kernel_parameters",
    "loss",
    "training",
]


def report_of(directory: Path) -> str:
    """Return the words of a report; without figures, which take seconds to draw."""
    html = render_html(alignment_report(directory))
    return " ".join(re.sub(r"<[^>]+>", " ", html.replace("&#39;", "'")).split())


def healthier(**changes: float) -> dict[str, object]:
    return {"heldout": {"before": BEFORE, "after": {**AFTER, **changes}, "images": 256}}


def test_run_gets_its_figures_and_one_file_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", with_attention=True)
    (run / "figures").mkdir()  # as an earlier attempt leaves it
    draw_alignment_figures(run)
    written = sorted(path.stem for path in (run / "figures").iterdir())
    assert written == sorted([*FIGURES, "attention"])
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html.count("<figure>") == 8
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)


def test_run_without_kernel_matrices_and_attention_is_drawn_without_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "kernel_matrices.json").unlink()
    draw_alignment_figures(run)
    written = {path.stem for path in (run / "figures").iterdir()}
    assert written == set(FIGURES) - {"kernel_matrices", "kernel_differences"}


def test_report_says_what_was_done(tmp_path: Path) -> None:
    text = report_of(write_run(tmp_path / "run"))
    for expected in (
        "some/clip",
        "some/dino (cls, 224 px)",
        "0.5 x kernel gap + 1 x preservation",
        "12,345 images of some/images",
        "256 images, taken",
        "20 of 20 planned, 64 images each",
        "1e-05 after 1 step of warm-up",
        "kuea-mllm 1.2.3",
    ):
        assert expected in text
    # A command may hold anything; it is text, not HTML.
    assert "kuea-mllm align &lt;b&gt;" in text


def test_gain_is_told_against_the_original_under_the_same_kernel(tmp_path: Path) -> None:
    # 0.01 against 0.04; against the start, 0.05, it would be 80 %.
    assert "75 % lower than the original tower's" in report_of(write_run(tmp_path / "run"))
    worse = write_run(tmp_path / "worse", **healthier(heldout_kernel_gap=0.06))
    text = report_of(worse)
    assert "50 % higher than the original tower's" in text
    assert "Look at these first" in text


def test_healthy_run_has_no_warning(tmp_path: Path) -> None:
    text = report_of(write_run(tmp_path / "run"))
    assert text.count("in range") == 6
    for warning in ("▲ out of range", "Look at these first", "Stopped early", "resumed"):
        assert warning not in text


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("heldout_kernel_gap", 0.041, "only the kernel constants moved"),
        ("heldout_cka_teacher", 0.46, "loses structure"),
        ("heldout_drift_cosine_mean", 0.79, "objective.preserve_weight"),
        ("heldout_drift_bound_mean", 2.1, "max_drift_bound"),
        ("heldout_patch_drift", 0.06, "objective.patch_preserve_weight"),
        ("heldout_zero_shot", 0.54, "leaves its text tower's space"),
    ],
)
def test_number_out_of_range_is_marked_with_advice(
    tmp_path: Path, key: str, value: float, advice: str
) -> None:
    text = report_of(write_run(tmp_path / "run", **healthier(**{key: value})))
    assert text.count("▲ out of range") == 1
    summary = text[text.index("Look at these first") : text.index("What was done")]
    assert advice in summary


def test_report_tells_of_early_stop_and_resumes(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        stopped_early="heldout_kernel_gap has not improved",
        resumed_at=[1500, 3000],
        optim={**MANIFEST["optim"], "steps": 5000},
    )
    text = report_of(run)
    assert "Stopped early at step 20 of 5,000: heldout_kernel_gap has not improved." in text
    assert "resumed 2 times, after step 1,500, 3,000." in text


def test_kernels_of_every_kind_are_described(tmp_path: Path) -> None:
    gaussian = {"type": "gaussian", "sigma": 8.7, "trainable": False}
    summed = {
        "type": "sum",
        "kernels": [
            {"weight": 1.0, "kernel": gaussian},
            {"weight": 2.5, "kernel": {"type": "cosine"}},
        ],
    }
    objective = {**MANIFEST["objective"], "student_kernel": summed, "teacher_kernel": POLYNOMIAL}
    text = report_of(write_run(tmp_path / "run", objective=objective))
    assert "1 x (gaussian: sigma 8.7, fixed) + 2.5 x (cosine)" in text
    assert "polynomial: degree 3, gamma 1, coef0 1, trained" in text


def test_section_of_another_report_shows_matrices_losses_and_numbers(tmp_path: Path) -> None:
    section = alignment_section(write_run(tmp_path / "run"))
    assert len([block for block in section.blocks if isinstance(block, Figure)]) == 2
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    assert ("kernel gap to the teacher", "0.05", "0.01") in table.rows


def test_terminal_shows_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    print_alignment_result("out", before=BEFORE, after=AFTER, seconds=12.3)
    printed = capsys.readouterr().out
    assert "0.05 -> 0.01" in printed
    assert "0.6 -> 0.61" in printed
