"""The OpenFlamingo adapter and its runtime on a tiny complete directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_flamingo import save_tiny_base
from transformers import CLIPVisionModel

from kuea_mllm.adapters.base import ChatRequest, MLLMImporter, Tap
from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.openflamingo import MANIFEST
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime, build_prompt
from kuea_mllm.errors import UserError

RED, BLUE = (Image.new("RGB", (40, 24), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("flamingo") / "base")


@pytest.fixture(scope="module")
def runtime(base: Path) -> OpenFlamingoRuntime:
    loaded = OpenFlamingoAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(loaded, OpenFlamingoRuntime)
    return loaded


def changed(base: Path, target: Path, file: str, **settings: Any) -> Path:
    shutil.copytree(base, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(content | settings))
    return target


def test_adapter_conforms(base: Path) -> None:
    adapter = MANIFEST.load()
    assert isinstance(adapter, OpenFlamingoAdapter)
    assert isinstance(adapter, MLLMImporter)
    assert problems_of(adapter, base) == []


def test_slot_reads_the_last_block_before_the_norm(base: Path) -> None:
    slot = OpenFlamingoAdapter().tower_slot(base)
    assert slot.tap == Tap((-1,), drops_cls=True, after_norm=False)
    assert slot.family == "clip"
    assert slot.module == "model.vision_tower"
    assert slot.projector_width == slot.vision_config["hidden_size"] == 32
    assert slot.mean == (0.48145466, 0.4578275, 0.40821073)
    assert slot.std == (0.26862954, 0.26130258, 0.27577711)


def test_slot_says_what_the_model_reads(base: Path) -> None:
    model: Any = OpenFlamingoForConditionalGeneration.from_pretrained(base)
    slot = OpenFlamingoAdapter().tower_slot(base)
    assert slot.tap is not None
    tower = OpenFlamingoAdapter().vision_module(model)
    assert isinstance(tower, CLIPVisionModel)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        read = states[slot.tap.layers[0]][:, int(slot.tap.drops_cls) :]
        assert torch.equal(model.model.resampler(read), model.encode_images(pixels))


def test_other_models_are_not_taken_for_openflamingo(base: Path, tmp_path: Path) -> None:
    adapter = OpenFlamingoAdapter()
    assert not adapter.recognises({"model_type": "audioflamingo3"})
    other = changed(base, tmp_path / "other", "config.json", model_type="llava")
    with pytest.raises(UserError, match="model_type 'llava', expected 'openflamingo'"):
        adapter.check_base(other)
    broken = changed(base, tmp_path / "broken", "config.json", text_config={"model_type": "mpt"})
    with pytest.raises(UserError, match="drops the query and key norms"):
        adapter.tower_slot(broken)
    with pytest.raises(UserError, match="has no vision_tower"):
        adapter.vision_module(torch.nn.Linear(1, 1))


def test_answers_depend_on_the_image(runtime: OpenFlamingoRuntime) -> None:
    asked = [ChatRequest("what?", (image,)) for image in (RED, BLUE, RED)]
    answers = runtime.generate(asked, max_new_tokens=6)
    assert answers[0] == answers[2] != answers[1]


def test_demonstrations_in_a_batch_answer_as_alone(runtime: OpenFlamingoRuntime) -> None:
    prompts = ["<image>Output:a<|endofchunk|>\n<image>Output:", "<image>Output:", "Output:"]
    images = [[RED, BLUE], [BLUE], []]
    for beams in (1, 3):
        together = runtime.complete(prompts, images, max_new_tokens=6, num_beams=beams)
        alone = [
            runtime.complete([prompt], [row], max_new_tokens=6, num_beams=beams)[0]
            for prompt, row in zip(prompts, images, strict=True)
        ]
        assert together == alone


def test_questions_are_asked_in_the_published_format() -> None:
    assert build_prompt("what is it?", image_count=1) == "<image>Question:what is it? Short answer:"
    assert build_prompt("a<image>b") == "Question:ab Short answer:"


def test_prompt_and_answer_have_to_fit_the_context(runtime: OpenFlamingoRuntime) -> None:
    # 256 positions; the last new token is never fed back.
    prompt = "x" * 250
    assert len(runtime.complete([prompt], [[]], max_new_tokens=7)) == 1
    with pytest.raises(UserError, match="prompt 0 has 250 tokens, more than the 249"):
        runtime.complete([prompt], [[]], max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], message: str, runtime: OpenFlamingoRuntime
) -> None:
    with pytest.raises(UserError, match=message):
        runtime.complete(["a"], [[]], **({"max_new_tokens": 2} | options))


def test_tokenizer_of_another_length_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    from tiny_flamingo import tiny_processor

    processor = tiny_processor()
    processor.tokenizer.add_tokens(["surplus"])
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizer of .* has \d+ tokens, the model \d+"):
        OpenFlamingoAdapter().open_runtime(tmp_path / "other", dtype="float32", device="cpu")


def test_half_precision_is_taken_as_asked(base: Path) -> None:
    loaded: Any = OpenFlamingoAdapter().open_runtime(base, dtype="bfloat16", device="cpu")
    assert loaded.describe()["dtype"] == "bfloat16"
    assert loaded.describe()["attention"] == "sdpa"
    assert len(loaded.generate([ChatRequest("what?", (RED,))], max_new_tokens=3)) == 1
