"""Questions to a model, how they are to be answered, and the order in which they are asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_NEW_TOKENS = 1024
"""Where a task sets no limit; the same as in lmms-eval's own model classes."""

_READ_KEYS = {
    "max_new_tokens",
    "num_beams",
    "temperature",
    "top_p",
    "do_sample",
    "until",
    "completes",
    "candidates",
}
_COMPLETION_KEYS = {"length_penalty", "class_names", "released"}


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded; questions of one batch share it.

    With `candidates`, no text is written: the answer is the one whose token is the likeliest first.

    The last four are for few-shot tasks: `completes` says that the prompt is complete as it is,
    with image tags and demonstrations; with `class_names` those are ranked instead of text written;
    `released` repeats faults of the published evaluation (docs/fewshot.md).
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    until: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
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
        load_images: Reads the images; called from a thread, some batches ahead.
        settings: How the answer is decoded.
        image: What the task calls the image. A hint only, by which questions about one image become
            neighbours; whether images are the same is decided by their pixels.
    """

    task: str
    doc_id: int
    prompt: str
    load_images: Callable[[], Sequence[Any] | None]
    settings: GenerationSettings
    image: str | None = None


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
        candidates=tuple(kwargs.get("candidates") or ()),
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


def in_order(questions: Sequence[PendingQuestion], *, by_image: bool) -> list[list[int]]:
    """Put questions that can be asked together into groups, in the order of asking.

    Questions about one image are neighbours. Otherwise the longest come first: similar lengths
    need little padding, and memory runs out at the start or not at all.
    """
    groups: dict[tuple[GenerationSettings, str], list[int]] = defaultdict(list)
    longest: dict[tuple[str, str], int] = {}
    for index, question in enumerate(questions):
        # Few-shot tasks one after the other: each has demonstrations of its own to remember.
        task = question.task if question.settings.completes else ""
        groups[question.settings, task].append(index)
        if question.image is not None:
            image = question.task, question.image
            longest[image] = max(longest.get(image, 0), len(question.prompt))

    def rank(index: int) -> tuple[int, tuple[str, str], int]:
        question = questions[index]
        length = len(question.prompt)
        if question.image is None or not by_image or question.settings.completes:
            return -length, ("", ""), -length
        image = question.task, question.image
        return -longest[image], image, -length

    return [sorted(group, key=rank) for group in groups.values()]
