"""Judging the answers of one column."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answering.generation import HOPELESS
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.judging.client import (
    JudgeClient,
    JudgeStopped,
    RequestRefused,
    require_plain_url,
)
from kuea_mllm.evaluation.judging.prompts import (
    JudgedDocument,
    Rules,
    build_prompt,
    imitates_layout,
    load_rules,
)
from kuea_mllm.evaluation.judging.verdicts import VerdictFile, hash_request, parse_verdict
from kuea_mllm.evaluation.results import SampleRow
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import utc_now

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import JudgeSettings

_SHOWN = 120


def describe_judge(settings: JudgeSettings) -> dict[str, Any]:
    """Say who judges and how, for the record; holds no key."""
    require_plain_url(settings.url)
    return {
        "url": settings.url,
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "prompt": load_rules().describe(),
    }


def require_judge(settings: JudgeSettings) -> None:
    """Make sure that the judge is there, before a model is opened.

    Raises:
        UserError: If address, model or key are wrong.
        EnvironmentFailure: If it cannot be reached.
    """
    load_rules()
    with JudgeClient(settings) as client:
        client.check()
    LOGGER.info("Judge: %s at %s.", settings.model, settings.url)


def judge_column(
    task: str,
    rows: Sequence[SampleRow],
    documents: Sequence[JudgedDocument],
    settings: JudgeSettings,
    path: Path,
    *,
    show_progress: bool = True,
) -> list[SampleRow]:
    """Let the judge score the answers of a task.

    Args:
        task: Name of the task.
        rows: Its rows; those without an answer are not judged.
        documents: What the judge has to know, one for each row.
        settings: The judge.
        path: File of the raw verdicts; those that are in it already are not asked for again.
        show_progress: Whether a progress bar is drawn.

    Returns:
        The rows in their order, each with the model's score, the reference's and the category, or
        failed with the judge's words as the reason.

    Raises:
        EnvironmentFailure: If the judge stops answering, or its first `HOPELESS` replies all hold
            no scores. The verdicts so far are in the file.
    """
    known = {document.doc_id: document for document in documents}
    missing = [row.doc_id for row in rows if row.doc_id not in known]
    if missing:
        raise EvaluationError(f"task {task}: the judge has no document {missing[0]} to read.")
    _warn_of_imitations(task, rows)
    rules, kept = load_rules(), VerdictFile(path)
    with JudgeClient(settings) as client:
        inquiries = [
            _Inquiry(task, row, known[row.doc_id], rules, client, kept)
            for row in rows
            # By the answer: rows that failed for want of a verdict are tried again.
            if row.answer != FAILED_ANSWER
        ]
        judged = _ask_all(task, inquiries, settings.concurrency, path, show_progress)
    done = [judged.get(row.doc_id, row) for row in rows]
    failed = sum(row.failed for row in judged.values())
    if failed:
        LOGGER.warning("Task %s: no verdict on %d of %d answers.", task, failed, len(judged))
    return done


def write_documents(path: Path, documents: Sequence[JudgedDocument]) -> None:
    """Keep what a judge has to know, so that results can be judged later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document)) + "\n")


def read_kept_documents(path: Path) -> list[JudgedDocument]:
    """Read what `write_documents` wrote.

    Raises:
        EvaluationError: If the file is missing or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [JudgedDocument(**json.loads(line)) for line in lines]
    except FileNotFoundError as error:
        raise EvaluationError(
            f"file {path} is missing, from which a judge learns what was asked.",
            "The results are not complete: evaluate again.",
        ) from error
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"file {path} does not hold judged documents: {error}.", "Evaluate again."
        ) from error


@dataclass(frozen=True)
class _Inquiry:
    """One answer to be judged."""

    task: str
    row: SampleRow
    document: JudgedDocument
    rules: Rules
    client: JudgeClient
    kept: VerdictFile

    def recall(self) -> SampleRow | None:
        """Return the row with the scores of an earlier sitting, if there are any."""
        scores = self.kept.scores(self.row.doc_id, hash_request(self._request()))
        return None if scores is None else self._scored(scores)

    def make(self) -> SampleRow:
        """Ask the judge."""
        request = self._request()
        key, reason = hash_request(request), ""
        for _ in range(1 + self.client.settings.retries):
            try:
                reply = self.client.ask(request)
            except RequestRefused as error:
                reason = f"the judge refuses the request: {error}"
                self._keep(key, {"text": "", "scores": None, "error": str(error)})
                break
            scores = parse_verdict(reply.text)
            self._keep(key, {**asdict(reply), "scores": scores})
            if scores is not None:
                return self._scored(scores)
            said = " ".join(reply.text.split())[:_SHOWN]
            reason = (
                f"the judge's first line is not two scores from 1 to 10: {said!r} "
                f"(stopped by {reply.finish_reason or 'nothing'})"
            )
        return replace(self.row, score=None, reference=None, failed=True, error=reason)

    def _request(self) -> dict[str, Any]:
        return self.client.request(build_prompt(self.document, self.row.answer, self.rules))

    def _scored(self, scores: tuple[float, float]) -> SampleRow:
        reference, score = scores
        category = self.document.category
        return replace(
            self.row, score=score, reference=reference, group=category, failed=False, error=None
        )

    def _keep(self, key: str, reply: Mapping[str, Any]) -> None:
        record = {
            "task": self.task,
            "doc_id": self.row.doc_id,
            "request": key,
            "asked_model": self.client.settings.model,
            **reply,
            "time": utc_now(),
        }
        self.kept.append(record)


def _ask_all(
    task: str, inquiries: Sequence[_Inquiry], concurrency: int, path: Path, show_progress: bool
) -> dict[int, SampleRow]:
    from tqdm import tqdm

    recalled = {inquiry.row.doc_id: inquiry.recall() for inquiry in inquiries}
    judged = {doc_id: row for doc_id, row in recalled.items() if row is not None}
    new = [inquiry for inquiry in inquiries if inquiry.row.doc_id not in judged]
    if not new:
        return judged
    client = new[0].client
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    try:
        client.check(is_patient=True)
        futures = [pool.submit(inquiry.make) for inquiry in new]
        with tqdm(
            total=len(futures), desc="Judging", unit="answer", disable=not show_progress
        ) as progress:
            for future in as_completed(futures):
                row = future.result()
                judged[row.doc_id] = row
                progress.update()
                _require_sense(task, judged, path)
    except JudgeStopped as error:
        raise EnvironmentFailure(
            f"{error.problem.rstrip('.')}; it judged {len(judged)} of {len(inquiries)} answers of "
            f"{task} before.",
            "The column is not finished and has no score. Start the judge again and go on with "
            "--resume: answers and verdicts so far are kept.",
        ) from error
    finally:
        # Before the threads are waited for: after an error they give up.
        client.close()
        pool.shutdown(wait=True, cancel_futures=True)
    return judged


def _require_sense(task: str, judged: Mapping[int, SampleRow], path: Path) -> None:
    if len(judged) == HOPELESS and all(row.failed for row in judged.values()):
        last = list(judged.values())[-1]
        raise EnvironmentFailure(
            f"the judge gave no verdict on the first {HOPELESS} answers of {task}, the last one "
            f"(document {last.doc_id}): {last.error}.",
            f"Use a judge that follows the instruction; its words are in {path}.",
        )


def _warn_of_imitations(task: str, rows: Sequence[SampleRow]) -> None:
    found = [row.doc_id for row in rows if imitates_layout(row.answer)]
    if found:
        LOGGER.warning(
            "Task %s: %d answers imitate the layout of the judge's prompt (first: document %d); "
            "they are sent as they are, look at their verdicts.",
            task,
            len(found),
            found[0],
        )
