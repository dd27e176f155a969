"""Answering questions with one model: batches, stop strings, retries, counted failures.

A question that cannot be answered gets `FAILED_ANSWER` and an entry in the session's failures; it
is never an empty string, which would pass for a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import ChoosingRuntime
from kuea_mllm.errors import DataError, EnvironmentFailure, KueaError
from kuea_mllm.evaluation.answering.preparing import Preparer, strict_image_files
from kuea_mllm.evaluation.answering.processes import process_number
from kuea_mllm.evaluation.answering.questions import (
    GenerationSettings,
    PendingQuestion,
    cut_at_stop,
    in_order,
)
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER, Failure, Session
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.evaluation.fewshot.completion import Completer

HOPELESS = 16
"""A run whose first so many questions all fail is stopped: something is wrong with all of it."""


@dataclass(frozen=True)
class _Caught:
    """What is kept of the error of a batch."""

    line: str
    is_out_of_memory: bool


class Answerer:
    """Works through questions with one open model.

    Args:
        session: The model, and where failures go.
        batch_size: Questions per forward pass at first; halved when memory runs out.
        keep: Called with the answers of every batch, by the place of their question; failed ones
            are left out.
    """

    def __init__(
        self,
        session: Session,
        batch_size: int,
        keep: Callable[[Mapping[int, str]], None] | None = None,
    ) -> None:
        self.session = session
        self.batch_size = batch_size
        self._keep = keep
        self._answered = 0

    def answer(self, questions: Sequence[PendingQuestion]) -> list[str]:
        """Answer every question.

        Returns:
            One answer per question, in the order given.

        Raises:
            EnvironmentFailure: If the first `HOPELESS` questions all fail.
        """
        from tqdm import tqdm

        answers: dict[int, str] = {}
        groups = in_order(questions, by_image=self.session.shared_prefix)
        with (
            strict_image_files(),
            Preparer(
                questions,
                [place for group in groups for place in group],
                self.session.runtime,
                batch_size=self.batch_size,
                names_images=self.session.shared_prefix,
            ) as prepared,
            tqdm(
                total=len(questions),
                desc="Answering",
                unit="question",
                disable=not self.session.show_progress or process_number() > 0,
            ) as progress,
        ):
            for batch in self._batches(groups):
                found = self._answer_batch(batch, questions, prepared.take(batch))
                answers.update(found)
                if self._keep is not None:
                    self._keep({p: text for p, text in found.items() if text != FAILED_ANSWER})
                progress.update(len(batch))
        if len(answers) != len(questions):
            raise RuntimeError(f"{len(answers)} answers for {len(questions)} questions")
        return [answers[index] for index in range(len(questions))]

    def _batches(self, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        for group in groups:
            start = 0
            while start < len(group):
                batch = group[start : start + self.batch_size]
                start += len(batch)
                yield batch

    def _answer_batch(
        self,
        batch: Sequence[int],
        questions: Sequence[PendingQuestion],
        prepared: Sequence[Future[Any]],
    ) -> dict[int, str]:
        answers: dict[int, str] = {}
        ready: list[tuple[int, PendingQuestion, Any]] = []
        for index, future in zip(batch, prepared, strict=True):
            question = questions[index]
            # Data sets hold whatever they hold; an unreadable image is one failed question.
            error = future.exception()
            if error is not None:
                answers[index] = self._fail(question, one_line(error))
                continue
            ready.append((index, question, future.result()))
            self._show(question, ready[-1][2])
        if ready:
            answers.update(self._generate(ready))
        return answers

    def _show(self, question: PendingQuestion, prepared: Any) -> None:
        observe = self.session.on_images
        if observe is None or process_number() > 0:
            return
        if not question.settings.completes:
            observe(question.task, question.doc_id, prepared.images)
            return
        # An image that cannot be decoded is reported when the question is answered.
        with suppress(DataError):
            observe(question.task, question.doc_id, OwnPicture(prepared))

    def _generate(self, ready: list[tuple[int, PendingQuestion, Any]]) -> dict[int, str]:
        settings = ready[0][1].settings
        failure: _Caught | None = None
        try:
            texts = self._texts(ready, settings)
            if len(texts) != len(ready):
                raise RuntimeError(f"{len(texts)} answers for a batch of {len(ready)}")
        # A model may fail in any way; the question is then tried alone, and counted if it fails.
        except Exception as error:
            failure = _Caught(one_line(error), is_out_of_memory(error))
        # Handled outside `except`, and without the error: its traceback keeps the tensors of the
        # failed batch alive.
        if failure is not None:
            return self._retry(ready, failure)
        self._answered += len(ready)
        return {
            index: cut_at_stop(text, settings.until)
            for (index, _, _), text in zip(ready, texts, strict=True)
        }

    def _texts(
        self, ready: list[tuple[int, PendingQuestion, Any]], settings: GenerationSettings
    ) -> list[str]:
        if settings.completes:
            prompts = [question.prompt for _, question, _ in ready]
            images = [images for _, _, images in ready]
            return completer_of(self.session).answer(prompts, images, settings)
        requests = [request for _, _, request in ready]
        runtime = self.session.runtime
        if settings.candidates:
            if not isinstance(runtime, ChoosingRuntime):
                raise TypeError("this runtime does not choose between candidates")
            return runtime.choose(requests, settings.candidates)
        return runtime.generate(
            requests,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    def _retry(
        self, ready: list[tuple[int, PendingQuestion, Any]], failure: _Caught
    ) -> dict[int, str]:
        if len(ready) == 1:
            index, question, _ = ready[0]
            return {index: self._fail(question, failure.line)}
        if failure.is_out_of_memory:
            self.batch_size = min(self.batch_size, len(ready) // 2)
            _release_memory()
            LOGGER.warning(
                "Out of memory at a batch of %d: going on with %d.", len(ready), self.batch_size
            )
        else:
            LOGGER.warning(
                "A batch of %d failed (%s): trying its questions one by one.",
                len(ready),
                failure.line,
            )
        answers: dict[int, str] = {}
        start = 0
        while start < len(ready):
            # Read anew for each part: the first may have found that half is too many as well.
            size = self.batch_size if failure.is_out_of_memory else 1
            answers.update(self._generate(ready[start : start + size]))
            start += size
        return answers

    def _fail(self, question: PendingQuestion, line: str) -> str:
        failures = self.session.failures
        failures.append(Failure(question.task, question.doc_id, line))
        LOGGER.warning("No answer for %s, document %d: %s", question.task, question.doc_id, line)
        if not self._answered and len(failures) >= HOPELESS:
            raise EnvironmentFailure(
                f"the first {len(failures)} questions all failed, the last one ({question.task}, "
                f"document {question.doc_id}) with: {line}",
                "Run with --limit 1 --debug to see where it fails.",
            )
        return FAILED_ANSWER


def completer_of(session: Session) -> Completer:
    """Return what answers the few-shot prompts of a session.

    Raises:
        EvaluationError: If its model takes no demonstrations.
    """
    if session.completer is None:
        from kuea_mllm.evaluation.fewshot.completion import Completer

        session.completer = Completer(session.runtime)
    return session.completer


class OwnPicture(Sequence[Any]):
    """The picture of a few-shot question, the last of its prompt; decoded if it is looked at."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images[-1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Any) -> Any:
        return self.images[place].open()


def is_out_of_memory(error: Exception) -> bool:
    """Recognise an accelerator's out-of-memory error, also where an adapter has wrapped it."""
    # By its text: CUDA has a class of its own, MPS raises a plain RuntimeError.
    return isinstance(error, RuntimeError | KueaError) and "out of memory" in str(error).lower()


def one_line(error: BaseException) -> str:
    """Write an error as one line of bounded length."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _release_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
