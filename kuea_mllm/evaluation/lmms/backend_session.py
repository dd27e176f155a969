"""An open model class of lmms-eval at work: made from its arguments, its answers looked at."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answering.generation import HOPELESS, one_line
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER, Failure, ImageObserver
from kuea_mllm.evaluation.lmms.backends import Backend
from kuea_mllm.evaluation.lmms.harness import run_lmms_eval
from kuea_mllm.evaluation.tasks import nearest_names
from kuea_mllm.log import LOGGER

# What classes call the model, the most specific name first.
_MODEL_ARGUMENTS = ("pretrained", "model", "model_version", "model_name", "model_id", "model_path")

# What lmms-eval's classes for hosted models give instead of an answer.
_PLACEHOLDERS = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")


@dataclass
class BackendSession:
    """An open model of a backend, at work on one evaluation.

    Attributes:
        backend: Class and arguments.
        lm: lmms-eval's model object.
        model: Directory or name of the model.
        fingerprint: Of the files of the directory, if it is one and they were hashed.
        failures: Filled while it answers.
        on_images: Sees the images of the first questions.
        shown: How many those are, of each task.
        tasks: The tasks at work.
    """

    backend: Backend
    lm: Any
    model: str
    fingerprint: str | None
    failures: list[Failure] = field(default_factory=list)
    on_images: ImageObserver | None = None
    shown: int = 0
    tasks: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Say what answers, for the record."""
        kind = type(self.lm)
        return {
            "backend": self.backend.name,
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "arguments": dict(self.backend.arguments),
        }

    def describe_model(self) -> dict[str, Any]:
        """Say which model was scored, as far as that is known."""
        return {
            "path": self.model,
            "name": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "adapter": None,
            "tower_fingerprint": None,
            "tower": None,
            "files_fingerprint": self.fingerprint,
            "unproven": f"backend {self.backend.name} does not show which vision tower it runs",
        }

    def run(self, tasks: Mapping[str, Any], **options: Any) -> tuple[dict[str, Any], Any]:
        """Run loaded tasks; takes and returns what `run_lmms_eval` does.

        Raises:
            EvaluationError: If a task cannot score an answer.
            EnvironmentFailure: If the backend fails.
        """
        self._adopt(tasks)
        results, tracker = run_lmms_eval(self, tasks, lm=self.lm, **options)
        # lmms-eval would copy the model object into its record.
        tracker.general_config_tracker.model_source = self.backend.name
        return results, tracker

    def _adopt(self, tasks: Mapping[str, Any]) -> None:
        """Bring the tasks into the shape that the model class reads."""
        from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

        for task in tasks.values():
            # The same data; the other class has only methods more, which write chat messages.
            if not self.lm.is_simple and type(task) is ConfigurableTask:
                task.__class__ = ConfigurableMessagesTask
        self.tasks = tasks

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """Answer lmms-eval's requests; stands in front of the class's own method.

        Raises:
            EnvironmentFailure: If the class fails, loses answers, or answers none of the first.
        """
        first = self._answer(requests[:HOPELESS])
        if first and first.count(FAILED_ANSWER) == len(first):
            raise EnvironmentFailure(
                f"backend {self.backend.name} answered none of the first {len(first)} questions, "
                f"the last one with: {self.failures[-1].error}",
                "Check its arguments (--set backend_args.NAME=VALUE) and that its server runs.",
            )
        return first + self._answer(requests[HOPELESS:])

    def close(self) -> None:
        """Let the class free what it holds."""
        type(self.lm).clean(self.lm)

    def _answer(self, requests: Sequence[Any]) -> list[Any]:
        if not requests:
            return []
        try:
            answers = list(type(self.lm).generate_until(self.lm, list(requests)))
        # Foreign code, and servers behind it.
        except Exception as error:
            raise EnvironmentFailure(
                f"backend {self.backend.name} failed: {self.backend.mask(one_line(error))}",
                "Run again with --debug for the traceback.",
            ) from error
        if len(answers) != len(requests):
            raise EnvironmentFailure(
                f"backend {self.backend.name} gave {len(answers)} answers to {len(requests)} "
                "questions.",
                "lmms-eval would score the others as wrong; use another backend.",
            )
        return [self._check(*pair) for pair in zip(requests, answers, strict=True)]

    def _check(self, request: Any, answer: Any) -> Any:
        from lmms_eval.api.instance import unwrap_generation_output

        doc_id, task, split = request.args[3:6]
        text, _ = unwrap_generation_output(answer)
        reason = self._why_none(text)
        if reason is not None:
            LOGGER.warning("No answer for %s, document %d: %s", task, doc_id, reason)
            self.failures.append(Failure(task, int(doc_id), reason))
            return FAILED_ANSWER
        if self.on_images is not None and doc_id < self.shown:
            document = self.lm.task_dict[task][split][doc_id]
            self.on_images(task, int(doc_id), self.tasks[task].doc_to_visual(document) or ())
        return answer

    def _why_none(self, text: Any) -> str | None:
        if not isinstance(text, str) or not text.strip():
            return "the answer is empty"
        if text.startswith(_PLACEHOLDERS):
            return self.backend.mask(" ".join(text.split()))[:300]
        return None


def open_backend(
    backend: Backend,
    model: str | Path,
    *,
    batch_size: int,
    device: str | None = None,
    fingerprint: str | None = None,
) -> BackendSession:
    """Make the model object of a backend.

    Args:
        backend: Class and arguments; an argument wins over the ones below.
        model: Directory, or what the backend calls the model.
        batch_size: Handed on where the class knows it.
        device: Handed on where the class knows it; None leaves the choice to the class.
        fingerprint: Of the files of the directory, for the record.

    Raises:
        EvaluationError: If the class does not take an argument.
        EnvironmentFailure: If it cannot be made.
    """
    from lmms_eval.models import MODEL_REGISTRY_V2

    model = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    with warnings.catch_warnings():
        # Deprecations inside other packages say nothing about the user's run.
        warnings.simplefilter("ignore")
        kind = MODEL_REGISTRY_V2.get_model_class(backend.name)
    known, takes_any = _parameters(kind)
    arguments = backend.values()
    unknown = [key for key in arguments if key not in known]
    if unknown and not takes_any:
        close = nearest_names(unknown[0], sorted(known))
        raise EvaluationError(
            f"backend {backend.name} has no argument {unknown[0]!r}.",
            f"Nearest names: {', '.join(close)}." if close else f"It has {', '.join(known)}.",
        )
    model_key = next((key for key in _MODEL_ARGUMENTS if key in known), None)
    offered = {model_key: model, "batch_size": batch_size, "device": device}
    for key, value in offered.items():
        if key is not None and key in known and value is not None:
            arguments.setdefault(key, value)
    LOGGER.info("Opening %s with lmms-eval's model class %s.", model, backend.name)
    try:
        lm = kind(**arguments)
    # Foreign code: missing keys, cards, libraries.
    except Exception as error:
        raise EnvironmentFailure(
            f"backend {backend.name} cannot be opened: {backend.mask(one_line(error))}",
            "Check its arguments (--set backend_args.NAME=VALUE); --debug shows the traceback.",
        ) from error
    session = BackendSession(backend, lm, model, fingerprint)
    lm.generate_until = session.answer
    # lmms-eval takes the model apart after each task, and there are more to come.
    lm.clean = lambda: None
    return session


def _parameters(kind: type) -> tuple[dict[str, None], bool]:
    """Return the arguments that a class takes, and whether it takes any others."""
    from lmms_eval.api.model import lmms

    known: dict[str, None] = {}
    takes_any = False
    for base in kind.__mro__:
        if base is lmms:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {parameter.kind for parameter in parameters}
        known |= dict.fromkeys(
            parameter.name
            for parameter in parameters
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        )
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        if not takes_any:
            break
    return known, takes_any
