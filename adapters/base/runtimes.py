"""A loaded model: questions and answers, and what it may be able to do beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class ChatRequest:
    """One question to an MLLM.

    Attributes:
        prompt: The user's question, without any conversation template or image placeholder.
        images: PIL images, put before the question; empty for a text-only question.
        image_keys: One name per image; images of one name have equal pixels, so that what a runtime
            computes of one image alone may serve several questions. Empty where that is not known.
        pixels: What `PreprocessingRuntime.preprocess` gave for each image; empty if it was not
            asked.
    """

    prompt: str
    images: tuple[Image, ...] = ()
    image_keys: tuple[str, ...] = ()
    pixels: tuple[Any, ...] = ()


@runtime_checkable
class MLLMRuntime(Protocol):
    """A loaded model that answers questions."""

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions.

        An answer does not depend on what else is in the batch, apart from float rounding.

        Args:
            requests: The batch; rows with and without images may be mixed.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width; 1 is greedy (or sampling).
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling; only with a temperature above 0.

        Returns:
            The new text of each request in order, without prompt and special tokens, stripped.

        Raises:
            UserError: If a request cannot be answered by this model, or an option is out of range.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Say how the model runs: at least `dtype`, `device` and `attention`, JSON values only."""
        ...

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower that is really in use, named as in the vision body.

        A fingerprint of these proves which tower gave the answers.
        """
        ...


@runtime_checkable
class ChoosingRuntime(Protocol):
    """What a runtime may provide on top: the likeliest of some given answers."""

    def choose(self, requests: Sequence[ChatRequest], candidates: Sequence[str]) -> list[str]:
        """Pick the candidate that the model would rather begin its answer with.

        The probabilities of the first new token are compared, in float32; nothing is generated.

        Args:
            requests: The batch; without any, only the candidates are checked.
            candidates: Answers of one token each, the earlier one first where two are as likely.

        Returns:
            One candidate per request.

        Raises:
            UserError: Naming a candidate that is not one token of its own.
        """
        ...


@runtime_checkable
class PreprocessingRuntime(Protocol):
    """What a runtime may provide on top: preparing images ahead, while the model is at work."""

    def preprocess(self, image: Image) -> Any:
        """Return what the model reads of an image, on the CPU; called from several threads.

        Raises:
            DataError: If the image cannot be decoded.
        """
        ...


@runtime_checkable
class FewShotRuntime(Protocol):
    """What a runtime may provide on top: prompts with demonstrations and their images.

    Images are encoded apart from the text, so that a demonstration which stands in many prompts is
    encoded once.
    """

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return the length of each prompt in tokens."""
        ...

    def prompt_room(self, max_new_tokens: int) -> int:
        """Return the most tokens that a prompt may have with an answer of this length."""
        ...

    def encode_images(self, images: Sequence[Image]) -> list[Tensor]:
        """Return what the model makes of each image by itself, to be handed to the others."""
        ...

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]] | Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float = 0.0,
        top_p: float | None = None,
        released: bool = False,
    ) -> list[str]:
        """Go on with prompts, `<image>` standing where an image belongs.

        Args:
            prompts: Texts, demonstrations and all.
            images: The images of each prompt in order, or what `encode_images` gave for them.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width.
            length_penalty: Of the beam search.
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling.
            released: Decode as the published code of the model does, faults included.

        Returns:
            The new text of each prompt as it comes, without special tokens.

        Raises:
            UserError: If a prompt does not fit its images or the context.
        """
        ...

    def rank(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]] | Sequence[Sequence[Tensor]],
        class_names: Sequence[str],
        *,
        released: bool = False,
    ) -> list[list[float]]:
        """Score class names as continuations of prompts.

        Args:
            prompts: As for `complete`.
            images: As for `complete`; with `released` also more than the prompt has places for.
            class_names: The candidates.
            released: Rank as the published code of the model does, faults included.

        Returns:
            For each prompt the mean log-probability of each name's tokens.

        Raises:
            UserError: If a prompt does not fit its images or the context.
        """
        ...
