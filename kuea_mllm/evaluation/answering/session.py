"""What the runner and lmms-eval's model class share: the open model and the failures.

lmms-eval makes its model from a string, so the runner leaves the model that it has opened (and
checked) under that string, where `KueaMLLM` picks it up. No lmms-eval here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMRuntime
    from kuea_mllm.evaluation.answering.journal import Journal
    from kuea_mllm.evaluation.fewshot.completion import Completer

FAILED_ANSWER = "\u26a0\u26a0\u26a0"
"""Stands where an answer is missing; lmms-eval scores it, we count it.

No words and no letters: some scorers look for "no" or an option letter anywhere in an answer.
"""

TOWER_PREFIX = "fp:"
"""Stands before a fingerprint in arguments: lmms-eval would read some of them as numbers."""

ImageObserver = Callable[[str, int, Sequence[Any]], None]
"""Called with task, document id and images whenever the images of a question were loaded."""


@dataclass(frozen=True)
class Failure:
    """A question that could not be answered.

    Attributes:
        task: Name of the task.
        doc_id: Document of the task.
        error: What happened, one line.
    """

    task: str
    doc_id: int
    error: str


@dataclass
class Session:
    """One model at work on one evaluation.

    A plain object on purpose: lmms-eval deletes every `nn.Module` that it finds as an attribute of
    its model class after the last request.

    Attributes:
        runtime: The open model.
        fingerprint: Fingerprint of its vision weights.
        failures: Filled while it answers, in the order of occurrence.
        on_images: Sees the images of every question (thumbnails are made there).
        show_progress: Whether a progress bar is drawn.
        completer: Answers few-shot prompts; made when the first one comes.
        shared_prefix: Whether questions about one image share what is computed of it alone.
        journal: Keeps the answers of the column between sittings; None keeps none.
        shown: How many documents `on_images` wants to see; those that another process or an
            earlier sitting has answered are loaded for it.
    """

    runtime: MLLMRuntime
    fingerprint: str
    failures: list[Failure] = field(default_factory=list)
    on_images: ImageObserver | None = None
    show_progress: bool = True
    completer: Completer | None = None
    shared_prefix: bool = True
    journal: Journal | None = None
    shown: int = 0


_OFFERED: dict[str, Session] = {}


def offer_session(model: str, session: Session) -> None:
    """Leave an open session for the model class that lmms-eval makes with `model=<model>`."""
    _OFFERED[model] = session


def take_session(model: str) -> Session | None:
    """Pick up a session that was left under `model`, once."""
    return _OFFERED.pop(model, None)


def path_to_argument(path: Path) -> str:
    """Write a path so that lmms-eval's `key=value,key=value` arguments can hold it.

    Commas, equals signs, quotes, brackets and the like are percent-encoded; ordinary paths stay
    as they are.
    """
    return quote(str(path), safe="/:+@~")


def argument_to_path(argument: str) -> Path:
    """Read a path back; a path that exists as written is taken as written."""
    literal = Path(argument)
    return literal if literal.exists() else Path(unquote(argument))
