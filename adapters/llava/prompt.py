"""The conversation format LLaVA-1.5 was trained with ("v1"), token for token.

Built here instead of from the chat template of the published models, which lacks the system prompt
and ends turns differently; and tokenized piece by piece, because a whole prompt with `<image>` as
one token loses the space token behind the image (fact sheet, section 7, traps 8 and 9).
"""

from __future__ import annotations

from typing import Any

from kuea_mllm.errors import UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TAG = "<image>"
TURN_END = "</s>"


def build_prompt(question: str, *, image_count: int = 0) -> str:
    """Return the prompt of one question, up to and with "ASSISTANT:".

    Args:
        question: The user's words; image tags in it are removed, images always come first.
        image_count: Number of images; several are separated by a space.
    """
    if image_count:
        tags = " ".join([IMAGE_TAG] * image_count)
        question = f"{tags}\n{_without_tags(question)}".strip()
    else:
        # A tag without an image would be taken for an image by the model.
        question = question.replace(IMAGE_TAG, "")
    return f"{SYSTEM} USER: {question} ASSISTANT:"


def tokenize_prompt(
    prompt: str, tokenizer: Any, *, image_token_id: int, tokens_per_image: int
) -> list[int]:
    """Tokenize a prompt as the original code does, with the image token once per patch.

    Each piece between image tags is tokenized on its own; in a Llama vocabulary this leaves a lone
    space token on both sides of an image.

    Args:
        prompt: Text with `<image>` where images go.
        tokenizer: A Llama tokenizer of transformers, legacy or not.
        image_token_id: Placeholder id of the model.
        tokens_per_image: How often it is repeated for one image.

    Returns:
        Token ids, beginning with the one that marks the beginning of a text.
    """
    ids: list[int] = [tokenizer.bos_token_id]
    for number, piece in enumerate(prompt.split(IMAGE_TAG)):
        if number:
            ids.extend([image_token_id] * tokens_per_image)
        ids.extend(tokenizer(piece, add_special_tokens=False)["input_ids"])
    return ids


def check_tokenizer(tokenizer: Any, where: str) -> None:
    """Make sure that a tokenizer speaks the v1 format, so that other LLaVAs are not misread.

    Raises:
        UserError: If it has no beginning-of-text token or does not end turns with `</s>`.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token != TURN_END:
        raise UserError(
            f"the tokenizer in {where} ends a turn with {tokenizer.eos_token!r} (beginning "
            f"{tokenizer.bos_token!r}); LLaVA-1.5 ends turns with {TURN_END!r}.",
            "This model follows another conversation format; the llava adapter is for LLaVA-1.5.",
        )


def _without_tags(question: str) -> str:
    return question.replace(IMAGE_TAG, "").strip()
