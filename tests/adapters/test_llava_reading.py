"""Settings of a LLaVA-1.5 directory that change which tokens it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.reading import ChecksReading

PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def problems(base: Path, **processor: Any) -> dict[str, str]:
    content = {key: value for key, value in (PROCESSOR | processor).items() if value is not None}
    (base / "processor_config.json").write_text(json.dumps(content))
    adapter = LlavaAdapter()
    assert isinstance(adapter, ChecksReading)
    return {problem.setting: problem.found for problem in adapter.reading_problems(base)}


def test_settings_of_training_are_no_problem(variant: Callable[..., Path]) -> None:
    assert problems(variant()) == {}


@pytest.mark.parametrize(
    ("config", "processor", "expected"),
    [
        ({"vision_feature_layer": -1}, {}, {"config.json: vision_feature_layer": "-1"}),
        (
            {"vision_feature_select_strategy": "full"},
            {"vision_feature_select_strategy": "full"},
            {"config.json: vision_feature_select_strategy": "with class token"},
        ),
        ({}, {"patch_size": None}, {"processor_config.json: patch_size": "not stated"}),
        ({}, {"patch_size": 14}, {"processor_config.json: patch_size": "14"}),
        (
            {},
            {"num_additional_image_tokens": None},
            {"processor_config.json: num_additional_image_tokens": "not stated"},
        ),
        (
            {},
            {"vision_feature_select_strategy": "full"},
            {"processor_config.json: vision_feature_select_strategy": "full"},
        ),
    ],
)
def test_other_settings_are_named(
    variant: Callable[..., Path],
    config: dict[str, Any],
    processor: dict[str, Any],
    expected: dict[str, str],
) -> None:
    assert problems(variant(**config), **processor) == expected


def test_directory_without_processor_file_says_nothing_of_it(
    variant: Callable[..., Path],
) -> None:
    found = LlavaAdapter().reading_problems(variant())
    assert [problem.setting for problem in found] == [
        f"processor_config.json: {key}"
        for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    ]


def test_original_layout_is_read_by_its_own_keys(tmp_path: Path) -> None:
    config = {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = [problem.setting for problem in LlavaAdapter().reading_problems(tmp_path)]
    assert found == [
        "config.json: mm_vision_select_layer",
        "config.json: mm_vision_select_feature",
    ]


def test_kindred_models_with_siglip_are_not_measured_by_llava_1_5(
    variant: Callable[..., Path],
) -> None:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 3}
    base = variant(
        vision_config={**vision, "patch_size": 4, "image_size": 16, "num_attention_heads": 4},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    full = {"vision_feature_select_strategy": "full"}
    assert problems(base, **full, num_additional_image_tokens=0) == {}
    expected = {"processor_config.json: num_additional_image_tokens": "1"}
    assert problems(base, **full) == expected
