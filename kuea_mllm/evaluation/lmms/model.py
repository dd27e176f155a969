"""The model class through which lmms-eval asks an adapter's model (`lmms-eval --model kuea_mllm`).

Only lmms-eval imports this module, by the path in its plugin manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lmms_eval.api.model import lmms

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.answers import answer_questions
from kuea_mllm.evaluation.answering.generation import completer_of
from kuea_mllm.evaluation.answering.opening import (
    choose_adapter,
    choose_placement,
    open_session,
    require_tower,
)
from kuea_mllm.evaluation.answering.questions import PendingQuestion, read_generation_kwargs
from kuea_mllm.evaluation.answering.session import (
    TOWER_PREFIX,
    Session,
    argument_to_path,
    take_session,
)
from kuea_mllm.evaluation.lmms.image_hints import image_hints
from kuea_mllm.log import LOGGER


class KueaMLLM(lmms):  # type: ignore[misc]
    """Any MLLM that an adapter can open, as a simple (text plus images) model of lmms-eval.

    There is no catch-all for arguments: a misspelt one ends the run.

    Args:
        model: Model directory; percent-encoded where it holds commas or equals signs.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:<index>"; None takes the first GPU, else the CPU.
        batch_size: Questions per forward pass.
        tower: Fingerprint of the vision tower. It makes the key of lmms-eval's response cache
            tell towers apart (the key holds this string, not the weights), and it is checked.
        adapter: Name of the adapter; None finds the one that recognises the directory.

    Raises:
        EvaluationError: If the model cannot be opened as asked or holds another tower.
    """

    is_simple = True

    def __init__(
        self,
        model: str | int,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        tower: str | int | float | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        # lmms-eval turns "123" into a number; a directory may be called that.
        model = str(model)
        session = take_session(model)
        if session is None:
            session = _open(model, dtype, device, adapter)
        expected = None if tower is None else str(tower).removeprefix(TOWER_PREFIX)
        require_tower(session, expected, model)
        self.session: Session = session
        self.batch_size_per_gpu = _read_batch_size(batch_size)
        self._ignored: set[str] = set()
        self._hints: dict[tuple[str, str], Sequence[str | None] | None] = {}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer the requests of all tasks, in the order given.

        Raises:
            AnsweredElsewhereError: In processes other than the first, whose share it is.
        """
        questions = [self._read_request(request) for request in requests]
        prompts = [question for question in questions if question.settings.completes]
        if prompts:
            # Before any work: a prompt is never cut short, which would lose the question.
            completer_of(self.session).require_room(prompts)
        return answer_questions(self.session, self.batch_size_per_gpu, questions)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: lmms-eval 0.7.3 turns every likelihood into a string and cannot score it."""
        self._refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: adapters answer single questions."""
        self._refuse("generate_until_multi_round", requests)

    def _read_request(self, request: Any) -> PendingQuestion:
        prompt, kwargs, to_visual, doc_id, task, split = request.args
        settings, ignored = read_generation_kwargs(kwargs or {})
        for key in ignored:
            if key not in self._ignored:
                self._ignored.add(key)
                LOGGER.warning("Task %s: generation setting %r has no effect here.", task, key)

        def load_images() -> Sequence[Any] | None:
            images: Sequence[Any] | None = to_visual(self.task_dict[task][split][doc_id])
            return images

        image = self._image_of(task, split, int(doc_id))
        return PendingQuestion(task, int(doc_id), prompt, load_images, settings, image)

    def _image_of(self, task: str, split: str, doc_id: int) -> str | None:
        if (task, split) not in self._hints:
            self._hints[task, split] = image_hints(self.task_dict[task][split])
        hints = self._hints[task, split]
        return None if hints is None else hints[doc_id]

    @staticmethod
    def _refuse(kind: str, requests: Sequence[Any]) -> NoReturn:
        task = requests[0].task_name if requests else "a task"
        raise EvaluationError(
            f"task {task} needs {kind!r} requests, which this model class does not answer.",
            "Use a task with `output_type: generate_until`.",
        )


def _open(model: str, dtype: str, device: str | None, adapter: str | None) -> Session:
    path = argument_to_path(model)
    chosen = choose_adapter(path, adapter)
    return open_session(chosen, path, choose_placement(device, dtype))


def _read_batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise EvaluationError(
            f"batch size {value!r} is not a positive number.", "Use --batch_size 8."
        )
    return size
