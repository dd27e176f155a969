"""Answering many questions with one model: batches, stop strings, retries, counted failures.

No lmms-eval here. A question that cannot be answered gets `FAILED_ANSWER` and an entry in the
session's failures; it is never an empty string, which would pass for a wrong answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import DataError, EnvironmentFailure, KueaError
from kuea_mllm.evaluation.session import FAILED_ANSWER, Failure, Session
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.evaluation.fewshot.completion import Completer

DEFAULT_NEW_TOKENS = 1024
"""Where a task sets no limit; the same as in lmms-eval's own model classes."""

HOPELESS = 16
"""A run whose first so many questions all fail is stopped: something is wrong with all of it."""

_READ_KEYS = {
    "max_new_tokens",
    "num_beams",
    "temperature",
    "top_p",
    "do_sample",
    "until",
    "completes",
}
_COMPLETION_KEYS = {"length_penalty", "class_names", "released"}


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded; questions of one batch share it.

    The last four are for few-shot tasks: `completes` says that the prompt is complete as it is,
    with image tags and demonstrations; with `class_names` those are ranked instead of text written;
    `released` repeats faults of the published evaluation (docs/fewshot.md).
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    until: tuple[str, ...] = ()
    completes: bool = False
    length_penalty: float = 0.0
    class_names: tuple[str, ...] = ()
    released: bool = False


@dataclass(frozen=True)
class PendingQuestion:
    """One request of lmms-eval.

    Attributes:
        task: Name of the task.
        doc_id: Document of the task.
        prompt: The question as the user says it.
        load_images: Reads the images; called once, right before the question's batch.
        settings: How the answer is decoded.
    """

    task: str
    doc_id: int
    prompt: str
    load_images: Callable[[], Sequence[Any] | None]
    settings: GenerationSettings


def read_generation_kwargs(kwargs: Mapping[str, Any]) -> tuple[GenerationSettings, list[str]]:
    """Translate a task's `generation_kwargs`.

    Returns:
        The settings, and the keys that this model class does not know.
    """
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(kwargs.get("temperature") or 0.0)
    # `do_sample` decides where it is given, as in transformers; stock tasks often say only one.
    if kwargs.get("do_sample") is False:
        temperature = 0.0
    elif kwargs.get("do_sample") and "temperature" not in kwargs:
        temperature = 1.0
    top_p = kwargs.get("top_p")
    completes = bool(kwargs.get("completes"))
    settings = GenerationSettings(
        max_new_tokens=int(kwargs.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        num_beams=int(kwargs.get("num_beams") or 1),
        temperature=temperature,
        top_p=float(top_p) if top_p is not None and temperature > 0.0 else None,
        until=tuple(stop for stop in stops if stop),
        completes=completes,
        length_penalty=float(kwargs.get("length_penalty") or 0.0) if completes else 0.0,
        class_names=tuple(kwargs.get("class_names") or ()) if completes else (),
        released=completes and bool(kwargs.get("released")),
    )
    known = _READ_KEYS | _COMPLETION_KEYS if completes else _READ_KEYS
    return settings, sorted(set(kwargs) - known)


def cut_at_stop(text: str, until: Sequence[str]) -> str:
    """Cut an answer before the first stop string in it."""
    ends = [end for stop in until if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


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
    """

    def __init__(self, session: Session, batch_size: int) -> None:
        self.session = session
        self.batch_size = batch_size
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
        with (
            strict_image_files(),
            tqdm(
                total=len(questions),
                desc="Answering",
                unit="question",
                disable=not self.session.show_progress,
            ) as progress,
        ):
            for batch in self._batches(questions):
                answers.update(self._answer_batch([(i, questions[i]) for i in batch]))
                progress.update(len(batch))
        # lmms-eval would score missing answers as wrong ones, without a message.
        if len(answers) != len(questions):
            raise RuntimeError(f"{len(answers)} answers for {len(questions)} questions")
        return [answers[index] for index in range(len(questions))]

    def _batches(self, questions: Sequence[PendingQuestion]) -> Iterator[list[int]]:
        groups: dict[tuple[GenerationSettings, str], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            # Few-shot tasks one after the other: each has demonstrations of its own to remember.
            task = question.task if question.settings.completes else ""
            groups[question.settings, task].append(index)
        for group in groups.values():
            # Similar lengths need little padding; the longest first, so that memory runs out at
            # the start or not at all.
            group.sort(key=lambda index: -len(questions[index].prompt))
            start = 0
            while start < len(group):
                batch = group[start : start + self.batch_size]
                start += len(batch)
                yield batch

    def _answer_batch(self, batch: list[tuple[int, PendingQuestion]]) -> dict[int, str]:
        answers: dict[int, str] = {}
        ready: list[tuple[int, PendingQuestion, Any]] = []
        for index, question in batch:
            try:
                ready.append((index, question, self._prepare(question)))
            # Data sets hold whatever they hold; an unreadable image is one failed question.
            except Exception as error:
                answers[index] = self._fail(question, one_line(error))
                continue
            self._show(question, ready[-1][2])
        if ready:
            answers.update(self._generate(ready))
        return answers

    def _show(self, question: PendingQuestion, prepared: Any) -> None:
        observe = self.session.on_images
        if observe is None:
            return
        if not question.settings.completes:
            observe(question.task, question.doc_id, prepared.images)
            return
        # An image that cannot be decoded is reported when the question is answered.
        with suppress(DataError):
            observe(question.task, question.doc_id, _OwnPicture(prepared))

    def _prepare(self, question: PendingQuestion) -> Any:
        from PIL.Image import Image

        from kuea_mllm.adapters.base import ChatRequest

        if question.settings.completes:
            return tuple(question.load_images() or ())
        images = []
        for image in question.load_images() or ():
            if not isinstance(image, Image):
                raise TypeError(f"only images are supported, the task gives {type(image).__name__}")
            images.append(image.convert("RGB"))
        return ChatRequest(prompt=question.prompt, images=tuple(images))

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
        return self.session.runtime.generate(
            [request for _, _, request in ready],
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
            size = len(ready) // 2
            self.batch_size = min(self.batch_size, size)
            _release_memory()
            LOGGER.warning("Out of memory at a batch of %d: going on with %d.", len(ready), size)
        else:
            size = 1
            LOGGER.warning(
                "A batch of %d failed (%s): trying its questions one by one.",
                len(ready),
                failure.line,
            )
        answers: dict[int, str] = {}
        for start in range(0, len(ready), size):
            answers.update(self._generate(ready[start : start + size]))
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


class _OwnPicture(Sequence[Any]):
    """The picture of a few-shot question, the last of its prompt; decoded if it is looked at."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images[-1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Any) -> Any:
        return self.images[place].open()


@contextmanager
def strict_image_files() -> Iterator[None]:
    """Make PIL refuse truncated files inside the block.

    lmms-eval switches that off for the whole process, so half an image would be scored in silence.
    """
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


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
