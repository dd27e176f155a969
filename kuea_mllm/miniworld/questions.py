"""Questions with known answers, in the styles of POPE, VQAv2, TextVQA and RefCOCO."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from kuea_mllm.miniworld.prompts import BOX_PROMPT, SHORT_ANSWER
from kuea_mllm.miniworld.scenes import DIGITS, Scene, SceneObject

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    Attributes:
        kind: What it asks for: "exists", "exists_coloured", "count", "colour", "read_colour",
            "read_quarter", "box" or "box_coloured".
        text: The question itself, without the instruction that follows it.
        answer: The right answer.
        box: The region asked for, where the answer is one.
    """

    kind: str
    text: str
    answer: str
    box: Box | None = None

    @property
    def prompt(self) -> str:
        """What the user says: the question and, for short answers, LLaVA's instruction."""
        return self.text if self.box is not None else self.text + SHORT_ANSWER


def format_box(box: Box) -> str:
    """Write a box as LLaVA-1.5 does: "[0.25, 0.50, 0.50, 0.75]"."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def ask_existence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask balanced yes/no questions, half of them about things that are not there.

    As in POPE: one question with "yes" and one with "no" per object. The absent things are other
    digits, or, for questions with a colour, a digit that exists in another colour.
    """
    absent = rng.permutation([digit for digit in range(len(DIGITS)) if digit not in scene.digits])
    questions = []
    for index, item in enumerate(scene.objects):
        wrong = DIGITS[absent[index]]
        if rng.random() < 0.5:
            questions += [_exists(item.digit_name, True), _exists(wrong, False)]
        else:
            right = f"{item.colour_name} {item.digit_name}"
            questions += [_exists(right, True), _exists(f"{item.colour_name} {wrong}", False)]
    return questions


def ask_count(scene: Scene) -> Question:
    """Ask how many digits there are."""
    answer = str(len(scene.objects))
    return Question("count", "How many digits are in the image?", answer)


def ask_colour(item: SceneObject) -> Question:
    """Ask for the colour of a digit."""
    return Question("colour", f"What color is the {item.digit_name}?", item.colour_name)


def ask_reading(item: SceneObject) -> Question:
    """Ask which digit has a colour."""
    return Question("read_colour", f"Which digit is {item.colour_name}?", item.digit_name)


def ask_quarters(scene: Scene) -> list[Question]:
    """Ask which digit is in a quarter of the image, for each quarter that holds just one."""
    crowd = Counter(item.quarter_name for item in scene.objects)
    return [
        Question(
            "read_quarter",
            f"Which digit is in the {item.quarter_name} of the image?",
            item.digit_name,
        )
        for item in scene.objects
        if crowd[item.quarter_name] == 1
    ]


def ask_box(item: SceneObject, *, is_coloured: bool) -> Question:
    """Ask for the box of a digit, named with its colour ("the red seven") or without."""
    name = f"{item.colour_name} {item.digit_name}" if is_coloured else item.digit_name
    text = f"{BOX_PROMPT} the {name}"
    kind = "box_coloured" if is_coloured else "box"
    return Question(kind, text, format_box(item.box), item.box)


def _exists(name: str, is_there: bool) -> Question:
    article = "an" if name.startswith("eight") else "a"
    kind = "exists_coloured" if " " in name else "exists"
    text = f"Is there {article} {name} in the image?"
    return Question(kind, text, "yes" if is_there else "no")


# How often each kind is asked in training; existence is the slowest to be learned.
_SHARES = (("exists", 0.35), ("colour", 0.15), ("reading", 0.25), ("box", 0.2), ("count", 0.05))


def sample_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Draw `count` training questions of all kinds about a scene, with repetition."""
    existence = ask_existence(scene, rng)
    reading = [*(ask_reading(item) for item in scene.objects), *ask_quarters(scene)]
    boxes = [ask_box(item, is_coloured=flag) for item in scene.objects for flag in (False, True)]
    pools = {
        "exists": existence,
        "colour": [ask_colour(item) for item in scene.objects],
        "reading": reading,
        "box": boxes,
        "count": [ask_count(scene)],
    }
    names = [name for name, _ in _SHARES]
    bounds = np.cumsum([share for _, share in _SHARES])
    draws = rng.random((count, 2)).tolist()
    chosen = []
    for kind, place in draws:
        pool = pools[names[int(np.searchsorted(bounds, kind, side="right"))]]
        chosen.append(pool[int(place * len(pool))])
    return chosen
