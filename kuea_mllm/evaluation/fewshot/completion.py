"""Answering few-shot prompts: features of images once, then completion or ranking in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import FewShotRuntime
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.fewshot.images import FeatureCache, StoredImage

if TYPE_CHECKING:
    from kuea_mllm.evaluation.answering.questions import GenerationSettings, PendingQuestion

DEFAULT_CAPACITY = 8192


class Completer:
    """Answers prompts that hold their demonstrations.

    Args:
        runtime: The open model.
        capacity: Images whose features are remembered.

    Raises:
        EvaluationError: If the model cannot take demonstrations.
    """

    def __init__(self, runtime: object, capacity: int = DEFAULT_CAPACITY) -> None:
        if not isinstance(runtime, FewShotRuntime):
            raise EvaluationError(
                "this model takes no demonstrations: its adapter has no few-shot runtime.",
                "Few-shot tasks are for OpenFlamingo (see docs/fewshot.md).",
            )
        self.runtime = runtime
        self.cache = FeatureCache(runtime, capacity)

    def require_room(self, questions: Sequence[PendingQuestion]) -> None:
        """Make sure that prompts fit the context: none is ever cut short.

        Raises:
            EvaluationError: Naming the first that does not.
        """
        counts = self.runtime.token_counts([question.prompt for question in questions])
        for question, count in zip(questions, counts, strict=True):
            require_fit(question.task, question.doc_id, count, self.room(question.settings))

    def room(self, settings: GenerationSettings) -> int:
        """Return the most tokens that a prompt may have with what follows it."""
        names = settings.class_names
        if not names:
            return self.runtime.prompt_room(settings.max_new_tokens)
        lengths = self.runtime.token_counts(names)
        # The published ranking feeds all names one after another, their last tokens included.
        return self.runtime.prompt_room(sum(lengths) + 1 if settings.released else max(lengths))

    def answer(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[StoredImage]],
        settings: GenerationSettings,
    ) -> list[str]:
        """Complete prompts, or rank the class names.

        Returns:
            The new text of each prompt; where classes are ranked, a JSON object of their
            log-likelihoods.
        """
        features: list[list[Any]] = self.cache.features(images)
        if settings.class_names:
            names = settings.class_names
            ranked = self.runtime.rank(prompts, features, names, released=settings.released)
            return [json.dumps(dict(zip(names, row, strict=True))) for row in ranked]
        return self.runtime.complete(
            prompts,
            features,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            temperature=settings.temperature,
            top_p=settings.top_p,
            released=settings.released,
        )


def require_fit(task: str, doc_id: int, count: int, room: int) -> None:
    """Refuse a prompt that is longer than the room for it.

    Raises:
        EvaluationError: Naming its document.
    """
    if count > room:
        raise EvaluationError(
            f"task {task}, document {doc_id}: the prompt has {count} tokens, more than the {room} "
            "there is room for.",
            "Use fewer demonstrations (--shots).",
        )
