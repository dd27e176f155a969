from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.errors import DataError, UserError
from kuea_mllm.towers.model.fingerprint import fingerprint_state


@pytest.fixture(scope="module")
def runtime(tiny_llava: Path) -> LlavaRuntime:
    loaded = LlavaAdapter().open_runtime(tiny_llava, dtype="float32", device="cpu")
    assert isinstance(loaded, LlavaRuntime)
    return loaded


def requests() -> list[ChatRequest]:
    noise = torch.randint(0, 256, (8, 20, 31, 3), generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(picture.to(torch.uint8).numpy()) for picture in noise]
    return [
        ChatRequest("word " * number + "?", (images[number],) if number % 3 else ())
        for number in range(8)
    ]


def test_batch_size_does_not_change_answers(runtime: LlavaRuntime) -> None:
    together = runtime.generate_ids(requests(), max_new_tokens=12)
    alone = [runtime.generate_ids([one], max_new_tokens=12)[0] for one in requests()]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 4


def test_beam_search_does_not_depend_on_the_batch(runtime: LlavaRuntime) -> None:
    together = runtime.generate(requests()[:4], max_new_tokens=6, num_beams=3)
    alone = [runtime.generate([r], max_new_tokens=6, num_beams=3)[0] for r in requests()[:4]]
    assert together == alone


def test_answers_are_text_only(runtime: LlavaRuntime) -> None:
    answers = runtime.generate(requests(), max_new_tokens=12)
    assert len(answers) == 8
    assert not any("<" in answer and ">" in answer for answer in answers)
    assert not any("ASSISTANT" in answer for answer in answers)


def test_padding_rows_of_the_vocabulary_never_win(runtime: LlavaRuntime) -> None:
    known = len(runtime.tokenizer)
    head = runtime.model.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[known:] = 50 * head[10:11]
        head[runtime.model.config.image_token_id] = 50 * head[11]
        head[runtime.tokenizer.pad_token_id] = 50 * head[12]
    try:
        ids = runtime.generate_ids(requests(), max_new_tokens=12)
    finally:
        with torch.no_grad():
            head.copy_(before)
    forbidden = {runtime.model.config.image_token_id, runtime.tokenizer.pad_token_id}
    assert all(token < known and token not in forbidden for row in ids for token in row)


def test_stored_sampling_settings_are_ignored(runtime: LlavaRuntime) -> None:
    assert runtime.model.generation_config.temperature is None
    once = runtime.generate(requests()[:2], max_new_tokens=8)
    assert once == runtime.generate(requests()[:2], max_new_tokens=8)


def test_images_are_padded_not_cropped(runtime: LlavaRuntime) -> None:
    # Only the ends of the wide image are white; a centre crop would not see them.
    image = Image.new("RGB", (96, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    values = runtime.prepare([ChatRequest("?", (image,))])["pixel_values"]
    assert values.shape == (1, 3, 16, 16)
    assert values.max() > 1


def test_several_images_go_first_in_order(runtime: LlavaRuntime) -> None:
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    inputs = runtime.prepare([ChatRequest("Compare them.", (red, blue))])
    image_id = runtime.model.config.image_token_id
    assert (inputs["input_ids"] == image_id).sum() == 2 * 16
    assert inputs["pixel_values"][0, 0].mean() > inputs["pixel_values"][1, 0].mean()
    assert runtime.generate([ChatRequest("Compare.", (red, blue))], max_new_tokens=2)


def test_image_tags_in_a_question_are_removed(runtime: LlavaRuntime) -> None:
    clean = runtime.prepare([ChatRequest("What?")])["input_ids"]
    assert torch.equal(runtime.prepare([ChatRequest("What?<image>")])["input_ids"], clean)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_taken_as_asked(tiny_llava: Path, dtype: str) -> None:
    runtime = LlavaAdapter().open_runtime(tiny_llava, dtype=dtype, device="cpu")
    assert runtime.describe()["dtype"] == dtype
    assert runtime.describe()["attention"] == "sdpa"
    assert {str(t.dtype) for t in runtime.vision_state().values()} == {f"torch.{dtype}"}
    assert isinstance(runtime.generate(requests()[:2], max_new_tokens=2), list)


def test_vision_state_has_the_fingerprint_of_the_files(
    runtime: LlavaRuntime, tiny_llava: Path
) -> None:
    from kuea_mllm.swapping import tower_fingerprint_of

    expected = tower_fingerprint_of(tiny_llava, LlavaAdapter())
    assert fingerprint_state(runtime.vision_state()) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 1, "temperature": 1.0, "top_p": 2.0}, "top_p"),
    ],
)
def test_impossible_options_are_refused(
    runtime: LlavaRuntime, options: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        runtime.generate(requests()[:1], **options)  # type: ignore[arg-type]


def test_sampling_is_reproducible_by_seed(runtime: LlavaRuntime) -> None:
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(
            runtime.generate(requests()[:2], max_new_tokens=8, temperature=5.0, top_p=0.9)
        )
    assert answers[0] == answers[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(UserError, match="'cuda' was asked for"):
        LlavaAdapter().open_runtime(tiny_llava, dtype="float32", device="cuda")


@pytest.mark.parametrize(
    ("dtype", "device", "words"), [("int8", "cpu", "int8"), ("float32", "gpu", "gpu")]
)
def test_unknown_names_are_refused(tiny_llava: Path, dtype: str, device: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlavaAdapter().open_runtime(tiny_llava, dtype=dtype, device=device)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_missing_padding_token_is_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    edit_json(base / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="padding token"):
        LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")


def test_padding_token_of_the_configuration_is_used(variant: Callable[..., Path]) -> None:
    base = variant(pad_token_id=0)
    edit_json(base / "tokenizer_config.json", pad_token=None)
    runtime = LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert len(runtime.generate(requests(), max_new_tokens=3)) == 8


def test_other_conversation_format_is_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    edit_json(base / "tokenizer_config.json", eos_token="<unk>")  # noqa: S106
    with pytest.raises(UserError, match="ends a turn with '<unk>'"):
        LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")


def test_weights_that_do_not_match_the_configuration_are_refused(
    variant: Callable[..., Path],
) -> None:
    base = variant(prefix="tower_vision.")
    with pytest.raises(UserError, match="missing keys"):
        LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")


def test_tensors_of_another_shape_are_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    text = json.loads((base / "config.json").read_text())["text_config"]
    edit_json(base / "config.json", text_config=text | {"vocab_size": 320})
    with pytest.raises(UserError, match=r"cannot be loaded|mismatched keys"):
        LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")


def test_unreadable_tokenizer_is_refused(variant: Callable[..., Path]) -> None:
    base = variant()
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")


def test_too_long_prompts_are_warned_of(
    runtime: LlavaRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("kuea_mllm"), "propagate", True)
    monkeypatch.setattr(runtime.model.config.text_config, "max_position_embeddings", 20)
    runtime.generate(requests()[:1], max_new_tokens=2)
    assert "made for 20" in caplog.text


def test_undecodable_image_is_named(runtime: LlavaRuntime, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:80])
    with Image.open(path) as image, pytest.raises(DataError, match=r"broken\.png"):
        runtime.generate([ChatRequest("?", (image,))], max_new_tokens=1)
