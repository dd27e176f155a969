"""Captions: which digits a scene shows, never their colour, place or size.

The gap is deliberate. It gives the mini CLIP the weakness of the real one: nothing in its training
rewards what captions leave out, while a teacher that saw the images alone keeps it.
"""

from __future__ import annotations

import numpy as np

from kuea_mllm.miniworld.scenes import DIGITS, Scene

PREFIXES = ("a photo of", "a picture of", "an image of", "a drawing of", "here we see")
_DROP_DIGIT = 0.2
_WRONG_DIGIT = 0.05
_NAME_TEXTURE = 0.4


def describe(digits: list[str], texture: str | None = None, prefix: str = PREFIXES[0]) -> str:
    """Put words together: "a photo of two, five and nine on a dotted background"."""
    named = digits[-1] if len(digits) == 1 else f"{', '.join(digits[:-1])} and {digits[-1]}"
    background = "" if texture is None else f" on a {texture} background"
    return f"{prefix} {named}{background}"


def caption_scene(scene: Scene, rng: np.random.Generator, *, is_noisy: bool = True) -> str:
    """Write a caption as found on the web: incomplete, and sometimes wrong.

    Args:
        scene: The scene to describe.
        rng: Source of every choice.
        is_noisy: Whether digits may be missing (20 % each, never all) or wrong (5 % each), and
            the texture unnamed (60 %). Without it every digit is named, and the texture never.
    """
    order = rng.permutation(len(scene.objects))
    names = [scene.objects[index].digit_name for index in order]
    prefix = PREFIXES[int(rng.integers(len(PREFIXES)))]
    if not is_noisy:
        return describe(names, prefix=prefix)
    kept = [name for place, name in enumerate(names) if place == 0 or rng.random() >= _DROP_DIGIT]
    words = [
        DIGITS[int(rng.integers(len(DIGITS)))] if rng.random() < _WRONG_DIGIT else name
        for name in kept
    ]
    texture = scene.texture_name if rng.random() < _NAME_TEXTURE else None
    return describe(words, texture, prefix)
