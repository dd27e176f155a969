"""Answering with the generic adapter: two models whose processors work in different ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_vlm_samples import PINPOINTS, TEXT, clip, llama, make_tokenizer, siglip
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.hf_vlm.runtime import HFVLMRuntime
from kuea_mllm.errors import UserError
from kuea_mllm.towers.model.fingerprint import fingerprint_state

ADAPTER = HFVLMAdapter()
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}TAG{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def random_weights(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the default, so that answers depend on every part of the input.
            is_norm = "norm" in name and parameter.dim() == 1
            noise = torch.randn_like(parameter) * (0.2 if is_norm else 0.5)
            parameter.copy_(parameter + noise if is_norm else noise)
    return model.eval()


def write_llava_next(out: Path) -> Path:
    tokenizer = make_tokenizer()
    size = {"height": 16, "width": 16}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace("TAG", "<image>"),
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    random_weights(LlavaNextForConditionalGeneration(config)).save_pretrained(out)
    processor.save_pretrained(out)
    return out


def write_gemma3(out: Path) -> Path:
    tokenizer = make_tokenizer()
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    tokenizer._set_model_specific_special_tokens(special_tokens=names)
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        chat_template=TEMPLATE.replace("TAG", "<boi>"),
        image_seq_length=4,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(tag) for name, tag in names.items()}
    config = Gemma3Config(
        vision_config=siglip(vision_use_head=False),
        text_config=Gemma3TextConfig(
            **{**TEXT, "num_hidden_layers": 2, "query_pre_attn_scalar": 16}
        ),
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    random_weights(Gemma3ForConditionalGeneration(config)).save_pretrained(out)
    processor.save_pretrained(out)
    return out


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llava_next": write_llava_next,
    "gemma3": write_gemma3,
}


@pytest.fixture(scope="module", params=WRITERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="module")
def runtime(base: Path) -> HFVLMRuntime:
    loaded = ADAPTER.open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(loaded, HFVLMRuntime)
    return loaded


def requests() -> list[ChatRequest]:
    noise = torch.randint(0, 256, (8, 20, 31, 3), generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(picture.to(torch.uint8).numpy()) for picture in noise]
    # Other shapes give LLaVA-NeXT other numbers of tiles.
    images[1] = images[1].resize((9, 30))
    images[4] = images[4].convert("L")
    rows = [
        ChatRequest("word " * number + "?", (images[number],) if number % 3 else ())
        for number in range(7)
    ]
    return [*rows, ChatRequest("Compare them.", (images[6], images[7]))]


def test_adapter_conforms(base: Path) -> None:
    assert problems_of(ADAPTER, base) == []


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(runtime: HFVLMRuntime, num_beams: int) -> None:
    options = {"max_new_tokens": 6, "num_beams": num_beams}
    together = runtime.generate_ids(requests(), **options)
    assert together == [runtime.generate_ids([one], **options)[0] for one in requests()]
    assert len({tuple(row) for row in together}) > 3


def test_first_step_is_that_of_the_plain_model(runtime: HFVLMRuntime) -> None:
    rows = [requests()[1], requests()[2]]
    together = runtime.prepare(rows)
    with torch.inference_mode():
        batch = runtime.model(**together).logits[:, -1]
        single = [runtime.model(**runtime.prepare([row])).logits[0, -1] for row in rows]
    torch.testing.assert_close(batch, torch.stack(single), rtol=0, atol=1e-4)


def test_sampling_is_repeatable_and_differs_from_greedy(runtime: HFVLMRuntime) -> None:
    rows = requests()[:2]

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return runtime.generate_ids(rows, max_new_tokens=6, temperature=3.0, top_p=0.95)

    greedy = runtime.generate_ids(rows, max_new_tokens=6)
    assert greedy == runtime.generate_ids(rows, max_new_tokens=6)
    assert sample(1) == sample(1)
    assert sample(1) not in (sample(2), greedy)


def test_images_matter_and_tags_in_a_question_do_not(runtime: HFVLMRuntime) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    prepared = [runtime.prepare([ChatRequest("?", (image,))]) for image in (red, blue)]
    with torch.inference_mode():
        first, second = (runtime.model(**inputs).logits[0, -1] for inputs in prepared)
    assert (first - second).abs().max() > 1e-3
    plain = runtime.prepare([ChatRequest("what  is this", (red,))])
    tag = runtime.processor.image_token
    tagged = runtime.prepare([ChatRequest(f"what {tag} is this", (red,))])
    assert torch.equal(plain["input_ids"], tagged["input_ids"])


def test_tokens_nobody_can_read_never_win(runtime: HFVLMRuntime) -> None:
    head = runtime.model.lm_head.weight
    before = head.detach().clone()
    known = len(runtime.tokenizer)
    assert known < len(head)
    with torch.no_grad():
        head[known:] = 50 * head[10:11]
        head[runtime.model.config.image_token_id] = 50 * head[11]
    try:
        answers = runtime.generate_ids(requests()[:4], max_new_tokens=6)
    finally:
        with torch.no_grad():
            head.copy_(before)
    image_token = runtime.model.config.image_token_id
    assert any(answers)
    assert all(token < known and token != image_token for row in answers for token in row)


def test_the_tower_in_use_is_the_one_on_disk(runtime: HFVLMRuntime) -> None:
    module = runtime.model.model.vision_tower
    assert fingerprint_state(runtime.vision_state()) == fingerprint_state(module.state_dict())
    assert runtime.describe()["tower"] == "model.vision_tower"


def test_model_without_chat_template_is_refused(base: Path, tmp_path: Path) -> None:
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    ADAPTER.check_base(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        ADAPTER.open_runtime(tmp_path, dtype="float32", device="cpu")


def test_template_that_forgets_the_image_is_refused(base: Path, tmp_path: Path) -> None:
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    loaded = ADAPTER.open_runtime(tmp_path, dtype="float32", device="cpu")
    with pytest.raises(UserError, match=r"cannot take a question with 1 images .*0 \S+ tokens"):
        loaded.generate([requests()[1]], max_new_tokens=2)
    # A processor that does not count itself.
    assert isinstance(loaded, HFVLMRuntime)
    with pytest.raises(UserError, match="leaves images out"):
        loaded._require_placeholders(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"num_beams": 0}, {"temperature": -1.0}, {"top_p": 0.0}]
)
def test_option_out_of_range_is_refused(runtime: HFVLMRuntime, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        runtime.generate(requests()[:1], **{"max_new_tokens": 2, **options})


def test_model_that_does_not_generate_is_refused(tmp_path: Path, base: Path) -> None:
    for file in base.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = [
        config["architectures"][0].replace("ForConditionalGeneration", "Model")
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not continue a conversation"):
        ADAPTER.open_runtime(tmp_path, dtype="float32", device="cpu")
