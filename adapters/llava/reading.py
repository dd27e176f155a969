"""Settings of a LLaVA-1.5 directory that change which tokens it reads, against those of training.

All released LLaVA-1.5 models were trained on the patch tokens of the second-to-last block. With
other settings they load and answer, only worse; or the number of image tokens in the prompt is
wrong, which the processor of transformers does not find out by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.llava.original import is_original, selected_tokens
from kuea_mllm.adapters.reading import ReadingProblem
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json

_TOWER = "clip_vision_model"
_LAYER = -2
_STRATEGY = "default"
_KEYS = ("vision_feature_layer", "vision_feature_select_strategy")
_ORIGINAL_KEYS = ("mm_vision_select_layer", "mm_vision_select_feature")
_PROCESSOR_FILE = "processor_config.json"


def find_reading_problems(base: Path) -> list[ReadingProblem]:
    """Compare the settings of a LLaVA-1.5 directory with those that the model was trained with.

    Raises:
        UserError: If a configuration cannot be read.
    """
    from kuea_mllm.adapters.llava.adapter import resolve_config

    raw = read_model_config(base)
    if is_original(raw):
        layer, drops_cls = selected_tokens(raw, base / "config.json")
        return list(_token_problems(layer, drops_cls, _ORIGINAL_KEYS))
    config = resolve_config(base)
    strategy = config.vision_feature_select_strategy
    drops_cls = strategy == _STRATEGY
    vision = config.vision_config
    problems = list(_processor_problems(base, strategy, vision))
    # Kindred models, LLaVA-Interleave for one, read the last block of a SigLIP tower.
    if vision.model_type == _TOWER:
        problems[:0] = _token_problems(config.vision_feature_layer, drops_cls, _KEYS)
    return problems


def _token_problems(
    layer: object, drops_cls: bool, keys: tuple[str, str]
) -> Iterator[ReadingProblem]:
    if layer != _LAYER:
        yield ReadingProblem(
            f"config.json: {keys[0]}",
            str(layer),
            str(_LAYER),
            "The projector was trained on another layer's tokens: answers get worse without any "
            "error.",
        )
    if not drops_cls:
        yield ReadingProblem(
            f"config.json: {keys[1]}",
            "with class token",
            "patches only",
            "The class token is passed on as if it were a patch, which LLaVA-1.5 never saw.",
        )


def _processor_problems(base: Path, strategy: object, vision: Any) -> Iterator[ReadingProblem]:
    path = base / _PROCESSOR_FILE
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"file {path} does not hold a JSON object.")
    class_tokens = int(vision.model_type == _TOWER)
    expected = (
        ("patch_size", vision.patch_size, "fails on the first image"),
        (_KEYS[1], strategy, "puts one image token too many or too few into the prompt"),
        (
            "num_additional_image_tokens",
            class_tokens,
            "puts another number of image tokens into the prompt (575 instead of 576, say)",
        ),
    )
    for key, usual, consequence in expected:
        found = settings.get(key, "not stated")
        if found != usual:
            yield ReadingProblem(
                f"{_PROCESSOR_FILE}: {key}",
                str(found),
                str(usual),
                f"The processor of transformers {consequence}. kuea-mllm counts image tokens "
                "itself; correct the file for other programs.",
            )
