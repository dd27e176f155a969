"""Reports of comparisons, from the results directories that they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Section
from kuea_mllm.reporting.examples import pick_flips
from kuea_mllm.reporting.html import write_report
from kuea_mllm.reporting.pages import comparison_report
from kuea_mllm.reporting.several import several_report
from kuea_mllm.reporting.text import one_line, value_text

SEVERAL = "comparisons"


def write_comparison_report(
    path: Path,
    *,
    comparison: Mapping[str, Any],
    baseline: Path | Sequence[Path] | None = None,
    candidate: Path | Sequence[Path] | None = None,
    extra_sections: Sequence[Section] = (),
    provenance: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of a comparison as one HTML file.

    Args:
        path: File to write.
        comparison: The JSON form of a comparison, or of several with one baseline.
        baseline: Results directory of the baseline: summary, samples and pictures; several where
            there are seeds. None takes what the comparison names.
        candidate: Results directory of the candidate, likewise.
        extra_sections: Sections to show after the comparison.
        provenance: Pairs of name and value that say how the comparison was made.

    Raises:
        EvaluationError: If the comparison is not complete or a sample file is not readable.
    """
    if comparison.get("kind") == SEVERAL:
        _write_several(path, comparison, extra_sections, provenance)
        return
    baselines = _directories(comparison, "baseline", baseline)
    candidates = _directories(comparison, "candidate", candidate)
    report = comparison_report(
        comparison=comparison,
        baselines=[_summary(directory) for directory in baselines],
        candidates=[_summary(directory) for directory in candidates],
        flips=pick_flips(comparison, baselines[0], candidates[0]),
        extra_sections=extra_sections,
        provenance=[
            *_named("baseline results", baselines),
            *_named("candidate results", candidates),
            *_settings(comparison),
            *provenance,
        ],
    )
    write_report(path, report)


def _write_several(
    path: Path,
    comparisons: Mapping[str, Any],
    extra_sections: Sequence[Section],
    provenance: Sequence[tuple[str, str]],
) -> None:
    pairs = comparisons["pairs"]
    baselines = _directories(pairs[0], "baseline", None)
    candidates = [_directories(pair, "candidate", None) for pair in pairs]
    report = several_report(
        comparisons=pairs,
        baselines=[_summary(directory) for directory in baselines],
        candidates=[[_summary(one) for one in directories] for directories in candidates],
        extra_sections=extra_sections,
        provenance=[
            *_named("baseline results", baselines),
            *[
                entry
                for directories in candidates
                for entry in _named("candidate results", directories)
            ],
            *_settings(pairs[0]),
            *provenance,
        ],
    )
    write_report(path, report)


def _directories(
    comparison: Mapping[str, Any], side: str, given: Path | Sequence[Path] | None
) -> list[Path]:
    """Return the results directories of one side, one for each seed."""
    if isinstance(given, Path):
        return [given]
    if given is not None:
        return list(given)
    found = comparison[side]
    return [Path(run["path"]) for run in found.get("runs") or [found]]


def _summary(directory: Path) -> Mapping[str, Any]:
    path = Path(directory) / "summary.json"
    if not path.is_file():
        raise EvaluationError(
            f"results directory {directory} holds no summary.json.",
            "The report needs the directories that were compared, where the comparison found them.",
        )
    summary: Mapping[str, Any] = read_json(path)
    return summary


def _named(name: str, directories: Sequence[Path]) -> list[tuple[str, str]]:
    return [(name, str(directory)) for directory in directories]


def _settings(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"comparison: {one_line(key)}", value_text(value))
        for key, value in comparison["settings"].items()
        if value is not None
    ]
