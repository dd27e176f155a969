"""The report of a comparison, from the two results directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import Section
from kuea_mllm.reporting.examples import pick_examples
from kuea_mllm.reporting.html import write_report
from kuea_mllm.reporting.pages import comparison_report
from kuea_mllm.reporting.text import one_line, value_text


def write_comparison_report(
    path: Path,
    *,
    comparison: Mapping[str, Any],
    baseline: Path,
    candidate: Path,
    extra_sections: Sequence[Section] = (),
    provenance: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of a comparison as one HTML file.

    Args:
        path: File to write.
        comparison: The comparison's JSON form.
        baseline: Results directory of the baseline: summary, samples and pictures.
        candidate: Results directory of the candidate.
        extra_sections: Sections to show after the comparison.
        provenance: Pairs of name and value that say how the comparison was made.

    Raises:
        EvaluationError: If the comparison is not complete or a sample file is not readable.
    """
    settings = [
        (f"comparison: {one_line(key)}", value_text(value))
        for key, value in comparison["settings"].items()
        if value is not None
    ]
    directories = [("baseline results", str(baseline)), ("candidate results", str(candidate))]
    report = comparison_report(
        comparison=comparison,
        baseline_summary=read_json(Path(baseline) / "summary.json"),
        candidate_summary=read_json(Path(candidate) / "summary.json"),
        examples=pick_examples(baseline, candidate, list(comparison["columns"])),
        extra_sections=extra_sections,
        provenance=[*directories, *settings, *provenance],
    )
    write_report(path, report)
