"""The results directory of a finished evaluation, and whether too much of it failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.evaluation.answering.processes import process_count
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.evaluation.column_run import gather_columns
from kuea_mllm.evaluation.judging.column import describe_judge
from kuea_mllm.evaluation.lmms.backend_session import BackendSession
from kuea_mllm.evaluation.lmms.backends import Backend
from kuea_mllm.evaluation.provenance import (
    describe_fewshot,
    describe_making,
    describe_runtime,
    describe_subject,
)
from kuea_mllm.evaluation.request import Request
from kuea_mllm.evaluation.results import KIND, SCHEMA_VERSION
from kuea_mllm.evaluation.unfinished import LOG, Unfinished
from kuea_mllm.io import atomic_directory, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import utc_now

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMAdapter
    from kuea_mllm.evaluation.answering.opening import Placement
    from kuea_mllm.evaluation.jobs import Jobs


def make_summary(
    request: Request,
    *,
    subject: MLLMAdapter | Backend,
    session: Session | BackendSession,
    placement: Placement,
    files: str | None,
    jobs: Jobs,
    columns: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        request: What was asked for.
        subject: What opened the model.
        session: The open model.
        placement: Where it ran.
        files: Fingerprint of the model's files; None of a name.
        jobs: The tasks.
        columns: Records of the finished columns.
        versions: Library versions.
        seconds: Time that it took.
    """
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": describe_subject(request.model_dir, subject, session),
        "model_record": describe_making(request.model_dir),
        "columns": {name: column["entry"] for name, column in columns.items()},
        "settings": {
            **request.asked(),
            "judge": None if request.judge is None else describe_judge(request.judge),
            "backend": request.backend,
            "dtype": placement.dtype,
            "device": placement.device,
            "seed": request.seed,
            "max_failures": request.max_failures,
            "processes": process_count(),
            "shared_prefix": request.shared_prefix,
            "runtime": describe_runtime(session),
        },
        "versions": dict(versions),
        "created": utc_now(),
        "command": request.command,
        "seconds": round(seconds, 1),
    }
    summary["model"]["files_fingerprint"] = files
    if isinstance(subject, Backend):
        # Its class decides on the number format, and on the device unless one was named.
        summary["settings"] |= {"dtype": None, "device": request.device}
    if request.fewshot is not None:
        summary["fewshot"] = describe_fewshot(jobs.fewshot, columns, request.fewshot)
    return summary


def write_results(
    out: Path, kept: Unfinished, summary: Mapping[str, Any], recipe: str | None
) -> None:
    """Write summary, rows and logs of all columns as one directory, whole or not at all."""
    with atomic_directory(out) as folder:
        gather_columns(kept, list(summary["columns"]), folder)
        write_json(folder / "summary.json", summary)
        if recipe is not None:
            (folder / "run.yaml").write_text(recipe, encoding="utf-8")
        (folder / LOG).write_bytes(kept.log.read_bytes())
    LOGGER.info("Results written to %s.", out)


def require_few_failures(columns: Mapping[str, Any], allowed: int, out: Path) -> None:
    """Fail if more questions than are allowed got no answer.

    Raises:
        EnvironmentFailure: Naming the first of them.
    """
    failed = sum(column["entry"]["failed"] for column in columns.values())
    if failed <= allowed:
        if failed:
            LOGGER.warning("%d questions got no answer (up to %d allowed).", failed, allowed)
        return
    name, (doc_id, error) = next(
        (name, column["first_failure"])
        for name, column in columns.items()
        if column["first_failure"] is not None
    )
    raise EnvironmentFailure(
        f"{failed} questions got no answer (allowed: {allowed}), the first one is document "
        f"{doc_id} of {name}: {(error or 'no answer').rstrip('.')}.",
        f"The results in {out} are complete and mark them as failed; pass --set max_failures="
        f"{failed} if that many are acceptable.",
    )
