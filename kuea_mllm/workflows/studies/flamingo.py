"""Two towers in one mini Flamingo, compared at several numbers of demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.evaluation.comparing.stats import compare_pairs
from kuea_mllm.manifest import current_command
from kuea_mllm.miniworld.flamingo_eval import FewShotScores, score_flamingo
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.towers.reading.load import load_tower


def compare_in_flamingo(
    base: Path, tower: Path, out: Path, *, questions: int, seed: int
) -> dict[str, Any]:
    """Swap a tower into a mini Flamingo and ask both models the same.

    Args:
        base: Flamingo directory with the original tower.
        tower: The aligned tower.
        out: Directory to create for the swapped model.
        questions: Questions for each task and number of shots.
        seed: Decides questions and demonstrations.

    Returns:
        `models` (name -> shots -> task -> percent), `differences` (shots -> task -> points with the
        ends of the 95 % interval), `questions`, and the fingerprints of both towers.
    """
    receipt = swap_tower_files(
        base, load_tower(tower), out, adapter=OpenFlamingoAdapter(), command=current_command()
    )
    scores = {
        name: score_flamingo(model, questions=questions, seed=seed)
        for name, model in (("original", base), ("aligned", out))
    }
    return {
        "questions": questions,
        "fingerprints": {
            "original": receipt.fingerprint_before,
            "aligned": receipt.fingerprint_after,
        },
        "models": {
            name: {str(shots): row for shots, row in found.means().items()}
            for name, found in scores.items()
        },
        "differences": differences(scores["original"], scores["aligned"]),
    }


def differences(
    original: FewShotScores, aligned: FewShotScores
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return aligned minus original in points, by shots and task, paired by question."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    tasks = list(original.per_question)
    for shots in original.per_question[tasks[0]]:
        pairs = {
            task: (original.per_question[task][shots], aligned.per_question[task][shots])
            for task in tasks
        }
        # The tasks have as many questions each, so the mean of all is the mean of the tasks.
        everything = (
            [score for before, _ in pairs.values() for score in before],
            [score for _, after in pairs.values() for score in after],
        )
        pairs["average"] = everything
        found[str(shots)] = {name: _compare(*pair) for name, pair in pairs.items()}
    return found


def _compare(before: list[float], after: list[float]) -> dict[str, float | None]:
    # One picture for each question: every question is a cluster of its own.
    result = compare_pairs(before, after, [str(number) for number in range(len(before))])
    return {
        "difference": 100 * result.difference,
        "low": None if result.low is None else 100 * result.low,
        "high": None if result.high is None else 100 * result.high,
        "p_value": result.p_value,
    }
