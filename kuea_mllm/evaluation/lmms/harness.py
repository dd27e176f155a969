"""The one place where lmms-eval is run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError, KueaError
from kuea_mllm.evaluation.answering.generation import one_line
from kuea_mllm.evaluation.answering.processes import AnsweredElsewhereError, exchange, seen_as_one
from kuea_mllm.evaluation.answering.session import (
    TOWER_PREFIX,
    Session,
    offer_session,
    path_to_argument,
    take_session,
)
from kuea_mllm.evaluation.lmms.loading import root_cause
from kuea_mllm.evaluation.plugin import MODEL_ID

if TYPE_CHECKING:
    from kuea_mllm.evaluation.lmms.backend_session import BackendSession


def run_lmms_eval(
    session: Session | BackendSession,
    tasks: Mapping[str, Any],
    *,
    model_dir: Path,
    dtype: str,
    device: str,
    batch_size: int,
    limit: int | None,
    seed: int,
    folder: Path,
    lm: Any = None,
) -> tuple[dict[str, Any], Any]:
    """Run loaded tasks on an open model.

    With `lm`, a model object of lmms-eval, that answers instead of our model class (see
    `backends`).

    Returns:
        lmms-eval's result dictionary (with `samples`), and its tracker for `save_lmms_files`.

    Raises:
        AnsweredElsewhereError: In processes other than the first, which have nothing to score.
        EvaluationError: If a task cannot score an answer.
        EnvironmentFailure: If lmms-eval ends without results.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker

    _require_plugin()
    model = path_to_argument(model_dir.resolve() if lm is None else model_dir)
    arguments = f"model={model},dtype={dtype},tower={TOWER_PREFIX}{session.fingerprint}"
    tracker = EvaluationTracker(output_path=str(folder))
    if isinstance(session, Session):
        offer_session(model, session)
    # Process zero may still be scoring the last column; lmms-eval's own barriers give up sooner.
    exchange(None)
    try:
        with stdout_to_stderr(), seen_as_one():
            results = simple_evaluate(
                model=MODEL_ID if lm is None else lm,
                model_args=arguments if lm is None else f"model={model}",
                tasks=list(tasks.values()),
                batch_size=batch_size,
                device=device,
                limit=limit,
                log_samples=True,
                evaluation_tracker=tracker,
                # Without this, documents carry their images through scoring, decoded anew.
                cli_args=argparse.Namespace(process_with_media=False, output_path=str(folder)),
                force_simple=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                datetime_str=datetime.now(UTC).strftime("%Y%m%d_%H%M%S"),
                # Otherwise lmms-eval scans its 2,000 task files although all tasks are objects.
                task_manager=_NoTasks(),
            )
    except (KueaError, AnsweredElsewhereError):
        raise
    # Scoring runs the tasks' own functions, wrapped in retries.
    except Exception as error:
        cause = root_cause(error)
        raise EvaluationError(
            f"lmms-eval stopped while running {', '.join(tasks)}: {one_line(cause)}",
            "Run again with --debug for the traceback.",
        ) from error
    finally:
        take_session(model)
    if not results or set(results["samples"]) != set(tasks):
        raise EnvironmentFailure("lmms-eval ended without results for all tasks.")
    return results, tracker


def save_lmms_files(
    tracker: Any, results: dict[str, Any], samples: Mapping[str, Sequence[Any]], folder: Path
) -> None:
    """Let lmms-eval write its own files, and make sure that it did.

    Args:
        tracker: As returned by `run_lmms_eval`.
        results: Its results without `samples`.
        samples: Its rows by task; the tracker rewrites them in place.
        folder: Where the files have to be.

    Raises:
        EnvironmentFailure: If a file is missing; lmms-eval swallows errors while writing.
    """
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=results["date"])
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    written = [path.name for path in folder.rglob("*") if path.is_file()]
    for ending in ("_results.json", *(f"_samples_{task}.jsonl" for task in samples)):
        if not any(name.endswith(ending) for name in written):
            raise EnvironmentFailure(
                f"lmms-eval did not write its file *{ending}.",
                "Check the free space of the output folder; nothing was left behind.",
            )


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Keep what tasks print while loading and scoring out of our own output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class _NoTasks:
    """Stands where lmms-eval wants a task index; task objects need none."""


def _require_plugin() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    if MODEL_ID not in MODEL_REGISTRY_V2.list_canonical_model_ids():
        # One broken plugin of any package makes lmms-eval drop all of them with a warning.
        raise EnvironmentFailure(
            f"lmms-eval does not know the model {MODEL_ID!r}, the plugin of this package.",
            "Reinstall kuea-mllm; if that does not help, another package's entry point in the "
            "group lmms_eval.models is broken: start lmms-eval once and read its warning.",
        )
