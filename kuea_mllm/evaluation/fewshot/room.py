"""Whether all prompts of an evaluation fit the context, before the first question is asked.

A prompt with pictures is counted in parts, every demonstration and every question once: its special
tokens keep the parts apart, so that the sum is exact. Each column counts its prompts again as a
whole when its turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kuea_mllm.evaluation.answering.questions import read_generation_kwargs
from kuea_mllm.evaluation.fewshot.completion import Completer, require_fit
from kuea_mllm.evaluation.fewshot.examples import Example, read_examples
from kuea_mllm.evaluation.fewshot.plan import Plan, read_plan
from kuea_mllm.evaluation.fewshot.prompts import build_prompt, demonstration, question
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask

_AT_ONCE = 4096


def require_room(completer: Completer, tasks: Sequence[FewShotTask]) -> None:
    """Make sure that the prompts of all tasks fit the context.

    Raises:
        EvaluationError: Naming the first that does not.
    """
    counter = _Counter(completer)
    for task in tasks:
        settings, _ = read_generation_kwargs(task.generation)
        room = completer.room(settings)
        lengths = counter.lengths(read_plan(task.path.with_suffix(".json")))
        if (lengths > room).any():
            number = int(np.argmax(lengths > room))
            require_fit(task.name, number, int(lengths[number]), room)


class _Counter:
    def __init__(self, completer: Completer) -> None:
        self.count = completer.runtime.token_counts
        # Tasks of one data set stand together and share these files.
        self.of_pool = lru_cache(maxsize=1)(self._of_pool)
        self.of_questions = lru_cache(maxsize=1)(self._of_questions)

    def lengths(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Return the length in tokens of each prompt of a task."""
        if not plan.shots:
            return self._of_whole(plan)
        pool = self.of_pool(plan.pool, plan.style)
        asked = self.of_questions(plan.documents, plan.style)
        found: npt.NDArray[np.int64] = asked + pool[plan.demonstrations].sum(axis=1)
        return found

    def _of_whole(self, plan: Plan) -> npt.NDArray[np.int64]:
        # Without pictures words meet words, so that parts could not be counted by themselves.
        pool, asked = _examples(plan.pool), _examples(plan.documents)
        counts: list[int] = []
        for start in range(0, len(asked), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(asked)))
            counts += self.count(
                [
                    build_prompt(
                        plan.style,
                        [pool[index] for index in plan.demonstrations[number].tolist()],
                        asked[number],
                        with_images=False,
                    )
                    for number in numbers
                ]
            )
        return np.asarray(counts, dtype=np.int64)

    def _of_pool(self, path: str, style: Any) -> npt.NDArray[np.int64]:
        pool = _examples(path)
        counts = np.zeros(max(pool, default=-1) + 1, dtype=np.int64)
        texts = [demonstration(style, example) for example in pool.values()]
        counts[list(pool)] = self.count(texts)
        return counts

    def _of_questions(self, path: str, style: Any) -> npt.NDArray[np.int64]:
        asked = _examples(path)
        texts = [question(style, asked[number]) for number in range(len(asked))]
        return np.asarray(self.count(texts), dtype=np.int64)


def _examples(path: str) -> Mapping[int, Example]:
    return read_examples(Path(path))
