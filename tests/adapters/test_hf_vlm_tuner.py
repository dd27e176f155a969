"""Tuning with the generic adapter: three classes that fit, and those that are refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_vlm_samples import TEXT, clip, llama, make_tokenizer, siglip
from PIL import Image
from test_hf_vlm_runtime import random_weights, write_gemma3, write_llava_next
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from kuea_mllm.adapters.base import MLLMTuner, TuningFormat
from kuea_mllm.adapters.conformance import tuner_problems_of
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.errors import DataError, UserError

ADAPTER = HFVLMAdapter()
TOLERANCE = 2e-5
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}TAG{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Says how long the conversation is, so that no beginning of one is a beginning of its text.
COUNTING = "{{ messages | length }}" + TEMPLATE
_WORDS = TEMPLATE[TEMPLATE.index("{% for part") : TEMPLATE.index("{% if message['role']")]
MARKING = COUNTING.replace(
    _WORDS,
    "{% if message['role'] == 'assistant' %}{% generation %}"
    f"{_WORDS}{{% endgeneration %}}{{% else %}}{_WORDS}{{% endif %}}",
)
CHAT = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "There"},
]


def set_template(base: Path, template: str) -> Path:
    tag = "<boi>" if "gemma3" in (base / "config.json").read_text() else "<image>"
    (base / "chat_template.jinja").write_text(template.replace("TAG", tag))
    return base


def write_llava(out: Path) -> Path:
    tokenizer = make_tokenizer()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    random_weights(LlavaForConditionalGeneration(config)).save_pretrained(out)
    processor.save_pretrained(out)
    return set_template(out, TEMPLATE)


def write_vipllava(out: Path) -> Path:
    tokenizer = make_tokenizer()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = VipLlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, 1],
    )
    random_weights(VipLlavaForConditionalGeneration(config)).save_pretrained(out)
    processor.save_pretrained(out)
    return set_template(out, TEMPLATE)


def write_tunable_gemma3(out: Path) -> Path:
    return set_template(write_gemma3(out), TEMPLATE)


def write_paligemma(out: Path) -> Path:
    tokenizer = make_tokenizer()
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=TEMPLATE)
    config = PaliGemmaConfig(
        vision_config=siglip(vision_use_head=False, projection_dim=32),
        text_config=GemmaConfig(**{**TEXT, "vocab_size": 2000}, final_logit_softcapping=30.0),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(out)
    processor.save_pretrained(out)
    return set_template(out, TEMPLATE)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llava": write_llava,
    "vipllava": write_vipllava,
    "gemma3": write_tunable_gemma3,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.fixture(scope="module", params=WRITERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reading(base: Path) -> TuningFormat:
    return ADAPTER.tuning_format(base, max_length=256)


def with_template(base: Path, out: Path, template: str) -> Path:
    shutil.copytree(base, out)
    return set_template(out, template)


def sample(reading: TuningFormat, *, image: bool = True, turns: Any = CHAT) -> list[int]:
    record = {"id": "r", "image": "a.png" if image else None, "conversations": turns}
    ids = reading.encoder.encode(record).input_ids
    return [
        token
        for each in ids
        for token in ([reading.image_token_id] * reading.tokens_per_image if each < 0 else [each])
    ]


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def padded(samples: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, samples))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in samples]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in samples]
        ),
    }


def rows(reading: TuningFormat) -> list[list[int]]:
    return [
        sample(reading)[:60],
        sample(reading, image=False, turns=CHAT[2:]),
        sample(reading, turns=CHAT[:2]),
    ]


@torch.no_grad()
def alone(model: Any, samples: list[list[int]], images: Tensor) -> list[Tensor]:
    states, used = [], 0
    for row in samples:
        batch = padded([row])
        if model.config.image_token_id in row:
            batch["pixel_values"] = images[used : used + 1]
            used += 1
        states.append(ADAPTER.hidden_states(model, batch)[0])
    return states


def test_adapter_is_a_tuner() -> None:
    assert isinstance(ADAPTER, MLLMTuner)


def test_adapter_conforms(base: Path) -> None:
    assert tuner_problems_of(ADAPTER, base) == []


def test_parts_are_those_of_the_class(base: Path, model: Any) -> None:
    parts = ADAPTER.tuning_parts(base)
    assert (parts.language_model, parts.vision_tower, parts.output_head) == (
        "model.language_model",
        "model.vision_tower",
        "lm_head",
    )
    assert parts.projector == ("model.multi_modal_projector",)
    assert parts.vocabulary_size == len(model_tokenizer(base)) < len(model.lm_head.weight)
    targets = linear_targets(ADAPTER.build_empty(base), parts)
    assert targets
    assert all(path.startswith("model.language_model.layers.") for path in targets)


def model_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_answers_and_the_tokens_that_end_them_are_learned(reading: TuningFormat) -> None:
    encoder: Any = reading.encoder
    for record in (
        {"id": "a", "image": "a.png", "conversations": CHAT},
        {"id": "b", "conversations": CHAT[2:] + CHAT[2:]},
    ):
        encoded = encoder.encode(record)
        learned = "".join(
            encoder.tokenizer.decode([token]) for token in encoded.labels if token != -100
        )
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        assert learned.replace(" ", "") == "".join(f"{a}</s>" for a in answers).replace(" ", "")
        assert encoded.input_ids.count(encoder.placeholder) == int("image" in record)
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            assert label in (-100, token)


def test_image_stands_where_the_tag_is_or_first(reading: TuningFormat) -> None:
    encoder: Any = reading.encoder

    def before(*values: str) -> str:
        turns = [
            {"from": ("human", "gpt")[number % 2], "value": value}
            for number, value in enumerate(values)
        ]
        ids = encoder.encode({"id": "r", "image": "a.png", "conversations": turns}).input_ids
        return str(encoder.tokenizer.decode(ids[: ids.index(encoder.placeholder)]))

    assert "Left" in before("Left <image> right", "a")
    assert "Left" not in before("Left right", "a")
    assert "first" in before("first", "a", "<image>then", "b")


def test_tokens_for_images_in_a_text_are_left_out(reading: TuningFormat) -> None:
    word = reading.encoder._place.tag  # type: ignore[attr-defined]
    turns = [{**CHAT[2], "value": f"Where?{word}"}, CHAT[3]]
    assert sample(reading, image=False, turns=turns) == sample(reading, image=False, turns=CHAT[2:])


def test_format_survives_pickling(reading: TuningFormat) -> None:
    again = pickle.loads(pickle.dumps(reading))
    assert sample(again) == sample(reading)
    picture = [Image.new("RGB", (30, 17), "red")]
    assert torch.equal(again.preprocess(picture), reading.preprocess(picture))
    assert reading.preprocess(picture).shape == (1, 3, reading.image_size, reading.image_size)


def test_mixed_rows_have_the_states_of_single_rows(model: Any, reading: TuningFormat) -> None:
    samples, images = rows(reading), pixels(2)
    with torch.no_grad():
        together = ADAPTER.hidden_states(model, {**padded(samples), "pixel_values": images})
    for row, states in zip(together, alone(model, samples, images), strict=True):
        scale = float(states.abs().max())
        torch.testing.assert_close(row[: len(states)], states, rtol=0, atol=TOLERANCE * scale)


def test_packed_samples_do_not_see_each_other(model: Any, reading: TuningFormat) -> None:
    samples, images = rows(reading), pixels(2)
    ids = [token for row in samples for token in row]
    positions = [place for row in samples for place in range(len(row))]
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "pixel_values": images,
    }
    with torch.no_grad():
        states = ADAPTER.hidden_states(model, batch)[0]
    expected = torch.cat(alone(model, samples, images))
    scale = float(expected.abs().max())
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE * scale)


def test_states_are_what_the_chat_of_the_runtime_computes(
    model: Any, base: Path, reading: TuningFormat
) -> None:
    from kuea_mllm.adapters.base import ChatRequest

    picture = Image.linear_gradient("L").convert("RGB").resize((40, 20))
    runtime: Any = ADAPTER.open_runtime(base, dtype="float32", device="cpu")
    prepared = runtime.prepare([ChatRequest("What is it?", (picture,))])
    ids = sample(reading, turns=CHAT[:2])
    prompt = prepared["input_ids"][0].tolist()
    # The prompt's last token is the blank that the answer's first letter brings along.
    kept = next(n for n, (a, b) in enumerate(zip(ids, [*prompt, -1], strict=False)) if a != b)
    assert kept >= len(prompt) - 1
    with torch.no_grad():
        expected = runtime.model(**prepared).logits[0, :kept]
        batch = {"input_ids": torch.tensor([ids]), "pixel_values": reading.preprocess([picture])}
        found = model.lm_head(ADAPTER.hidden_states(model, batch))[0, :kept]
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)


def test_tower_gives_no_gradient_even_where_inputs_ask_for_one(base: Path) -> None:
    model: Any = ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")
    model.enable_input_require_grads()
    model.model.multi_modal_projector.requires_grad_(True)
    seen: list[bool] = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].requires_grad)
    )
    features = ADAPTER.image_features(model, pixels(2))
    features.square().sum().backward()
    assert features.dim() == 3
    assert seen == [False]
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert trained
    assert all(name.startswith("model.multi_modal_projector.") for name in trained)


def test_template_that_marks_answers_is_taken(llava: Path, tmp_path: Path) -> None:
    plain = ADAPTER.tuning_format(llava, max_length=256).encoder
    marked = ADAPTER.tuning_format(with_template(llava, tmp_path / "a", MARKING), max_length=256)
    turns = {"id": "r", "image": "a.png", "conversations": CHAT[:2]}
    found = [label for label in marked.encoder.encode(turns).labels if label != -100]
    expected = [label for label in plain.encode(turns).labels if label != -100]
    assert found == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (COUNTING, "when the conversation goes on, and marks no answers"),
        (TEMPLATE.replace("{{ eos_token }}", ""), "no token behind an answer that ends it"),
        (TEMPLATE.replace("TAG", ""), "cannot take a conversation"),
    ],
    ids=["no prefix", "no end", "no image"],
)
def test_template_that_cannot_be_trained_with_is_refused(
    llava: Path, tmp_path: Path, template: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        ADAPTER.tuning_format(with_template(llava, tmp_path / "a", template), max_length=256)


def test_missing_template_is_refused(llava: Path, tmp_path: Path) -> None:
    (with_template(llava, tmp_path / "a", TEMPLATE) / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        ADAPTER.tuning_format(tmp_path / "a", max_length=256)


def test_record_that_the_template_cannot_take_is_named(llava: Path) -> None:
    encoder = ADAPTER.tuning_format(llava, max_length=256).encoder
    with pytest.raises(DataError, match="record 'r': turn 2 is from 'human'"):
        encoder.encode({"id": "r", "conversations": [CHAT[2], CHAT[2]]})


# Pillow and NumPy 2 about copies, where the processor of PaliGemma takes a single picture.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_llava_next, r"LlavaNextForConditionalGeneration\) reads images with image_sizes"),
        (write_paligemma, r"PaliGemmaForConditionalGeneration\) marks other tokens than those of"),
    ],
)
def test_models_that_read_images_in_another_way_are_refused_by_name(
    write: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        ADAPTER.tuning_format(set_template(write(tmp_path / "a"), TEMPLATE), max_length=256)


@pytest.mark.parametrize(
    ("write", "settings", "words"),
    [
        (
            write_llava,
            {"do_center_crop": False},
            r"Llava.*\) takes a number of tokens for an image that depends on its shape",
        ),
        (
            write_tunable_gemma3,
            {
                "do_pan_and_scan": True,
                "pan_and_scan_min_crop_size": 16,
                "pan_and_scan_max_num_crops": 4,
                "pan_and_scan_min_ratio_to_activate": 1.2,
            },
            r"Gemma3.*\) reads images otherwise than its image processor alone",
        ),
    ],
    ids=["no crop", "pan and scan"],
)
def test_images_that_are_not_read_alike_are_refused_by_name(
    write: Callable[[Path], Path], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "a")
    path = base / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= settings
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        ADAPTER.tuning_format(base, max_length=256)


def test_logits_that_are_capped_are_refused_by_name(tmp_path: Path) -> None:
    base = write_paligemma(tmp_path / "a")
    assert json.loads((base / "config.json").read_text())["text_config"]["final_logit_softcapping"]
    with pytest.raises(UserError, match=r"PaliGemma.* does more to its logits than its output"):
        ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")
