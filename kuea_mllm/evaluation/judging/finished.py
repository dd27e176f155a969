"""Judging columns that are finished: those of this run, and those of results from before.

Answers are written first and judged from there. A judge that stops in the middle therefore costs
no answer, and verdicts that are there are not asked for again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.columns import Column, score_column
from kuea_mllm.evaluation.judging.column import (
    describe_judge,
    judge_column,
    read_kept_documents,
    require_judge,
)
from kuea_mllm.evaluation.results import Results, file_name, load_results, write_rows
from kuea_mllm.evaluation.unfinished import COLUMN, Unfinished
from kuea_mllm.io import atomic_directory, read_json, require_free_output, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import utc_now

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import JudgeSettings

FOLDER = "judge"
"""In results: what each judged task needs to be judged, and the raw verdicts."""


def documents_path(folder: Path, task: str) -> Path:
    """Return where the documents of a judged task lie."""
    return folder / FOLDER / f"{file_name(task)}.documents.jsonl"


def verdicts_path(folder: Path, task: str) -> Path:
    """Return where the raw verdicts on a task lie."""
    return folder / FOLDER / f"{file_name(task)}.jsonl"


def judge_finished_columns(
    unfinished: Unfinished,
    names: Sequence[str],
    settings: JudgeSettings | None,
    *,
    show_progress: bool = True,
) -> None:
    """Judge the finished columns of an evaluation that need it and have no score yet.

    Args:
        unfinished: Where they lie.
        names: The tasks, in their order.
        settings: The judge; None leaves the columns as they are, marked missing.
        show_progress: Whether a progress bar is drawn.

    Raises:
        EnvironmentFailure: If the judge stops answering; columns and verdicts are kept.
    """
    for name in names:
        column = unfinished.column(name)
        record = read_json(column / COLUMN)
        if settings is None or not record["entry"]["judged"] or not record["entry"]["missing"]:
            continue
        LOGGER.info("Judging %s.", name)
        # Beside the columns, which are replaced as a whole where a run begins anew.
        verdicts = verdicts_path(unfinished.path, name)
        judged = _judge(column, name, record["entry"], settings, verdicts, show_progress)
        write_rows(column / judged.entry["samples"], judged.rows)
        shutil.copyfile(verdicts, verdicts_path(column, name))
        failed = next((row for row in judged.rows if row.failed), None)
        first = None if failed is None else [failed.doc_id, failed.error]
        # Last: a column without it is judged again, from the verdicts.
        write_json(column / COLUMN, {**record, "entry": judged.entry, "first_failure": first})


def judge_results(
    results: Path,
    settings: JudgeSettings,
    out: Path,
    *,
    max_failures: int = 0,
    command: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Judge the answers of a finished evaluation and write it, with scores, to a new directory.

    With the judge that has judged before, gaps are filled; with another one all judged columns are
    judged again, so that no results hold verdicts of two judges. When the judge stops answering,
    its verdicts are kept in `OUT.verdicts`, and the same call goes on from there.

    Args:
        results: A results directory.
        settings: The judge.
        out: Directory to create.
        max_failures: Answers without a verdict that are put up with.
        command: The command line, for the record.
        show_progress: Whether progress bars are drawn.

    Returns:
        The content of the new `summary.json`.

    Raises:
        UserError: If there is nothing to judge, or the judge is not as it has to be.
        EnvironmentFailure: If the judge cannot be reached or stops, or if more than `max_failures`
            answers got no verdict; in the last case the directory is written all the same.
    """
    out = Path(out)
    require_free_output(out)
    found = load_results(results)
    judge = describe_judge(settings)
    names = _to_judge(found, judge)
    require_judge(settings)
    kept = out.with_name(f"{out.name}.verdicts")
    columns = {}
    for name in names:
        LOGGER.info("Judging %s.", name)
        verdicts = kept / f"{file_name(name)}.jsonl"
        before = verdicts_path(found.path, name)
        if before.is_file() and not verdicts.exists():
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before, verdicts)
        columns[name] = _judge(
            found.path, name, found.columns[name], settings, verdicts, show_progress
        )
    summary = {
        **found.summary,
        "columns": {
            name: columns[name].entry if name in columns else dict(entry)
            for name, entry in found.columns.items()
        },
        "settings": {**found.summary["settings"], "judge": judge},
        "judged": {"created": utc_now(), "command": command},
    }
    with atomic_directory(out) as folder:
        # The report shows the scores of before.
        without_report = shutil.ignore_patterns("report.html")
        shutil.copytree(found.path, folder, ignore=without_report, dirs_exist_ok=True)
        for name, column in columns.items():
            write_rows(folder / column.entry["samples"], column.rows)
            shutil.copyfile(kept / f"{file_name(name)}.jsonl", verdicts_path(folder, name))
        write_json(folder / "summary.json", summary)
    for name in names:
        (kept / f"{file_name(name)}.jsonl").unlink()
    # What else lies there is not ours.
    with suppress(OSError):
        kept.rmdir()
    LOGGER.info("Results written to %s.", out)
    _require_few_failures(columns, max_failures, out)
    return summary


def _to_judge(results: Results, judge: Mapping[str, Any]) -> list[str]:
    """Choose the columns that need this judge."""
    judged = [name for name, entry in results.columns.items() if entry.get("judged")]
    if not judged:
        raise EvaluationError(
            f"results {results.path} hold no column that a judge scores.",
            "Those are LLaVA-Bench: evaluate with --suite llava-paper, or on llava_in_the_wild.",
        )
    if not _is_same_judge(results.summary["settings"].get("judge"), judge):
        return judged
    gaps = [
        name
        for name in judged
        if results.columns[name]["missing"] is not None
        or any(row.score is None and row.answer != FAILED_ANSWER for row in results.rows(name))
    ]
    if not gaps:
        raise EvaluationError(
            f"results {results.path} hold a verdict of this judge on every answer already."
        )
    return gaps


def _is_same_judge(before: Any, now: Mapping[str, Any]) -> bool:
    # The address may be another one.
    keys = [key for key in now if key != "url"]
    return isinstance(before, Mapping) and all(before.get(key) == now[key] for key in keys)


def _judge(
    folder: Path,
    task: str,
    entry: Mapping[str, Any],
    settings: JudgeSettings,
    verdicts: Path,
    show_progress: bool,
) -> Column:
    """Judge the answers in a directory; writes the verdicts only."""
    rows = judge_column(
        task,
        Results(folder, {"columns": {task: entry}}).rows(task),
        read_kept_documents(documents_path(folder, task)),
        settings,
        verdicts,
        show_progress=show_progress,
    )
    failed = sum(row.failed for row in rows)
    # Also said where no row has a score.
    column = Column({**entry, "missing": "the judge gave no verdict", "failed": failed}, rows)
    return score_column(column)


def _require_few_failures(columns: Mapping[str, Column], allowed: int, out: Path) -> None:
    failed = [(name, row) for name, column in columns.items() for row in column.rows if row.failed]
    if len(failed) <= allowed:
        return
    name, row = failed[0]
    reason = (row.error or "the model gave no answer").rstrip(".")
    raise EnvironmentFailure(
        f"{len(failed)} answers got no verdict (allowed: {allowed}), the first one is document "
        f"{row.doc_id} of {name}: {reason}.",
        f"The results in {out} are complete and mark them as failed; pass --max-failures "
        f"{len(failed)} if that many are acceptable.",
    )
