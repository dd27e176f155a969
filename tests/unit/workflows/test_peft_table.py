"""The table of baseline, +align, +peft and +both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.errors import OutputError
from kuea_mllm.io import read_json
from kuea_mllm.reporting.peft import peft_markdown, peft_section, peft_text
from kuea_mllm.workflows.studies.peft_scores import Answers, summarise_peft

PICTURES = ["a", "b", "c", "d"]


def world(**scores: list[float]) -> dict[str, dict[str, Answers]]:
    """Models that differ in the task `read`, and are all right in the task `easy`."""
    easy = Answers(PICTURES, [100.0] * 4)
    return {
        model: {"read": Answers(PICTURES, values), "easy": easy} for model, values in scores.items()
    }


WORLDS = [
    world(baseline=[0, 0, 100, 100], align=[0, 0, 0, 100], peft=[100, 0, 100, 100], both=[100] * 4),
    world(
        baseline=[0, 0, 100, 100],
        align=[0, 0, 100, 100],
        peft=[100, 0, 100, 100],
        both=[100, 0, 100, 100],
    ),
]


def columns(table: dict[str, Any], model: str, other: str) -> dict[str, Any]:
    [found] = [
        row["columns"]
        for row in table["differences"]
        if (row["model"], row["to"]) == (model, other)
    ]
    result: dict[str, Any] = found
    return result


def test_differences_are_paired_within_a_world() -> None:
    table = summarise_peft(WORLDS)
    assert table["scores"]["both"]["read"] == {"mean": 87.5, "per_seed": [100.0, 75.0]}
    assert table["scores"]["align"]["average"] == {"mean": 68.75, "per_seed": [62.5, 75.0]}
    found = columns(table, "both", "peft")
    assert found["read"]["per_seed"] == [25.0, 0.0]
    # Mean 12.5, standard error 12.5, t(0.975, 1 degree of freedom) 12.7062.
    assert found["read"]["mean"] == 12.5
    assert found["read"]["low"] == pytest.approx(12.5 - 158.8276, abs=1e-3)
    assert found["read"]["high"] == pytest.approx(12.5 + 158.8276, abs=1e-3)
    assert found["average"]["per_seed"] == [12.5, 0.0]
    assert columns(table, "align", "baseline")["read"]["mean"] == -12.5
    assert columns(table, "both", "baseline")["read"]["mean"] == 37.5


def test_pictures_are_resampled_together_in_all_worlds() -> None:
    found = columns(summarise_peft(WORLDS), "peft", "baseline")["read"]
    # Picture a gained in both worlds. With 4 pictures the levels of the interval are widened to
    # 0.01 and 99.99 %, where all of 4 pictures drawn are a. Drawn for each world apart, 6 of 8
    # would be that bound.
    assert (found["mean"], found["low"], found["high"]) == (25.0, 25.0, 25.0)
    assert (found["questions"]["low"], found["questions"]["high"]) == (0.0, 100.0)
    # A task's pictures are not another's: 4 of 8 over both tasks.
    average = columns(summarise_peft(WORLDS), "peft", "baseline")["average"]
    assert (average["mean"], average["questions"]["high"]) == (12.5, 50.0)


def test_one_world_has_intervals_over_questions_only() -> None:
    table = summarise_peft(WORLDS[:1])
    found = columns(table, "peft", "baseline")["read"]
    assert (found["low"], found["high"], found["questions"]["high"]) == (None, None, 100.0)
    text = peft_markdown(table)
    assert text.count("| models |") == 1
    assert "| +peft vs baseline | +25.0 [+0.0, +100.0] | +0.0 " in text
    assert "| +both | 100.0 | 100.0 | 100.0 |" in text
    asked = peft_markdown({**table, "settings": {"questions": 1500}})
    assert "Scores in percent, n = 1,500 questions of each task." in asked


def test_markdown_report_and_terminal_show_both_intervals() -> None:
    table = summarise_peft(WORLDS)
    text = peft_markdown(table)
    assert text.count("| models |") == 2
    assert "| +both vs +peft | +12.5 [-146.3, +171.3] (1/2) | " in text
    assert "| +peft vs baseline | +25.0 [+25.0, +25.0] (2/2) | " in text
    assert len(peft_section(table).blocks) == 1 + 3 + 1
    assert len(peft_text(table)) == 3


# lmms-eval leaves closing its result file to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_study_makes_four_models_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kuea_mllm.miniworld import ASSETS, tasks
    from kuea_mllm.workflows.studies import steps
    from kuea_mllm.workflows.studies.peft_table import run_peft_study

    # Figures and three more tasks take most of the time and have tests of their own.
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS[:1])
    for name in ("draw_alignment_figures", "draw_tuning_figures"):
        monkeypatch.setattr(steps, name, None)
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds" / "seed0").symlink_to(ASSETS)

    def run(**changes: Any) -> dict[str, Any]:
        return run_peft_study(
            tmp_path / "study",
            **{
                "seeds": 1,
                "worlds": tmp_path / "worlds",
                "questions": 8,
                "split": "test",
                "jobs": 1,
                "align": ["optim.steps=2", "optim.warmup_steps=1", "optim.batch_size=64"],
                "lora": ["optim.steps=2", "optim.batch_size=16", "optim.micro_batch_size=16"],
                "train_images": 128,
                "conversations": 32,
                **changes,
            },
        )

    record = run()
    place = tmp_path / "study" / "seed0"
    towers = record["per_seed"][0]["towers"]
    assert towers["baseline"] == towers["peft"] != towers["align"] == towers["both"]
    # The answers are those of the models that `lora --merge` wrote.
    for name in ("peft", "both"):
        summary = read_json(place / "results" / name / "summary.json")
        assert summary["model"]["path"].endswith(f"lora-{name}/merged")
        assert record["scores"][name]["miniworld_pope"]["mean"] == pytest.approx(
            100 * summary["columns"]["miniworld_pope"]["score"]
        )
    # The runs differ in the base only: same conversations, order and start.
    runs = [(place / f"lora-{name}" / "run.yaml").read_text() for name in ("peft", "both")]
    first, second = (text.splitlines() for text in runs)
    assert [a.split(":")[0].strip() for a, b in zip(first, second, strict=True) if a != b] == [
        "path"
    ]
    assert "+both vs +peft" in (tmp_path / "study" / "report.html").read_text()

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a finished seed was repeated")

    monkeypatch.setattr(steps, "align_miniworld", refuse)
    assert run()["differences"] == record["differences"]
    with pytest.raises(OutputError, match="other settings: questions"):
        run(questions=10)
