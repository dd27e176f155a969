"""The texts around questions: LLaVA-1.5's conversation format and its fixed sentences."""

from __future__ import annotations

from kuea_mllm.miniworld.scenes import COLOURS, DIGITS, QUARTERS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
BOX_PROMPT = "Please provide the bounding box coordinate of the region this sentence describes:"


def before_image() -> str:
    """The first piece of a prompt, up to the image."""
    return f"{SYSTEM} USER: "


def after_image(question: str) -> str:
    """The second piece of a prompt, from the image to the answer."""
    return f"\n{question} ASSISTANT:"


def conversation(question: str, answer: str | None = None) -> str:
    """One full turn of the `vicuna_v1` conversation with its image placeholder.

    Args:
        question: The user's text, without the image placeholder.
        answer: The assistant's text; without it the result is the prompt for generation.
    """
    prompt = f"{before_image()}<image>{after_image(question)}"
    return prompt if answer is None else f"{prompt} {answer}</s>"


def example_texts() -> list[str]:
    """Texts that together hold every word a prompt or an answer of the world can have."""
    coordinates = [f"{step / 4:.2f}" for step in range(5)]
    return [
        *coordinates,
        conversation(f"{BOX_PROMPT} the red seven", f"[{', '.join(coordinates)}]"),
        conversation("Is there a seven or an eight in the image?" + SHORT_ANSWER, "yes"),
        conversation("How many digits are in the image?", "no"),
        conversation("What color is the digit?", " ".join(COLOURS)),
        conversation("Which digit is in the of?", " ".join((*DIGITS, *QUARTERS))),
        "one two 0 1 2 3 4 5 6 7 8 9",
    ]


def fixed_phrases() -> list[str]:
    """Runs of words that always come together, with the space before them where there is one."""
    return [
        f" {SYSTEM}",
        " USER:",
        " ASSISTANT:",
        SHORT_ANSWER.strip(),
        BOX_PROMPT,
        "Is there",
        " in the image",
        "What color is the",
        "Which digit is",
        " in the top",
        " in the bottom",
        " of the image",
        "How many digits are in the image",
        *(f" {step / 4:.2f}," for step in range(5)),
        *(f"{step / 4:.2f}," for step in range(5)),
    ]
