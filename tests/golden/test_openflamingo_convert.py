"""The golden's released files to a Hugging Face directory, into the model, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from openflamingo_golden import (
    TOLERANCE,
    case,
    cases_with,
    golden_tower,
    index,
    openflamingo_dir,
    pixels,
    tensors,
    worst,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.convert import (
    export_checkpoint,
    export_language_model,
    import_released,
)
from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
from kuea_mllm.adapters.openflamingo.processing import OpenFlamingoProcessor
from kuea_mllm.errors import KueaError, OutputError, UserError

VISION = index()["config"]["vision"]
TOWER: dict[str, Any] = {
    "activation": golden_tower().spec.activation,
    "heads": VISION["width"] // VISION["head_width"],
}
RELEASED = openflamingo_dir() / "flamingo" / "checkpoint.safetensors"
CHECKPOINT = tensors("flamingo/checkpoint.safetensors")
LANGUAGE_MODEL = tensors("lm/model.safetensors")


def convert(out: Path, **changes: Any) -> Path:
    parts = {
        "checkpoint": RELEASED,
        "language_model": openflamingo_dir() / "lm",
        "tower": openflamingo_dir() / "vision" / "visual.safetensors",
    }
    import_released(destination=out, **(parts | TOWER | changes))
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Small weight files, so that there are several.
    return convert(tmp_path_factory.mktemp("flamingo") / "hf", shard_bytes=1 << 18)


def language_model(directory: Path, state: dict[str, Tensor], **settings: Any) -> Path:
    """Write a language model like the golden's with other weights or settings."""
    shutil.copytree(openflamingo_dir() / "lm", directory, copy_function=shutil.copyfile)
    save_file(state, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: t for key, t in state.items() if key != name}


@torch.no_grad()
@pytest.mark.parametrize("name", cases_with("logits"))
def test_converted_model_equals_the_original(name: str, converted: Path) -> None:
    model: Any = OpenFlamingoForConditionalGeneration.from_pretrained(converted)
    given = case(name)
    found = model.eval()(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        pixel_values=pixels(given["pixel_values"]),
    ).logits
    assert worst(found, given["logits"], given["attention_mask"]) <= TOLERANCE


def test_converted_directory_conforms(converted: Path) -> None:
    assert len(list(converted.glob("model-*.safetensors"))) > 2
    assert problems_of(OpenFlamingoAdapter(), converted) == []
    processor = OpenFlamingoProcessor.from_pretrained(converted)
    assert len(processor.tokenizer) == index()["config"]["embedding_rows_after_resize"]
    assert processor.image_token_id == index()["config"]["ids"]["<image>"]
    assert processor.tokenizer.pad_token_id == index()["config"]["ids"]["<PAD>"]
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.image_size == VISION["image_size"]


def test_stored_generation_settings_end_with_the_chunk(converted: Path) -> None:
    model: Any = OpenFlamingoForConditionalGeneration.from_pretrained(converted)
    ids = index()["config"]["ids"]
    assert model.generation_config.eos_token_id == ids["<|endofchunk|>"]
    assert model.generation_config.pad_token_id == ids["<PAD>"]
    assert model.generation_config.use_cache is True


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_is_equal_bit_for_bit(suffix: str, converted: Path, tmp_path: Path) -> None:
    target = tmp_path / f"checkpoint{suffix}"
    export_checkpoint(converted, target)
    back = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    assert back.keys() == CHECKPOINT.keys()
    assert all(back[name].dtype == t.dtype for name, t in CHECKPOINT.items())
    assert all(torch.equal(back[name], t) for name, t in CHECKPOINT.items())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    with pytest.raises(OutputError, match="exists already"):
        export_checkpoint(converted, target)


def test_saved_and_loaded_model_converts_back_bit_for_bit(converted: Path, tmp_path: Path) -> None:
    model: Any = OpenFlamingoForConditionalGeneration.from_pretrained(converted)
    model.save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], t) for name, t in CHECKPOINT.items())
    export_language_model(tmp_path / "again", tmp_path / "lm.safetensors")
    back = load_file(tmp_path / "lm.safetensors")
    assert back.keys() == LANGUAGE_MODEL.keys()
    for name, tensor in LANGUAGE_MODEL.items():
        if name != EMBEDDING:
            assert torch.equal(back[name], tensor), name


def test_half_precision_parts_keep_their_dtype(tmp_path: Path) -> None:
    half = {name: t.bfloat16() for name, t in CHECKPOINT.items()}
    save_file(half, tmp_path / "checkpoint.safetensors")
    out = convert(tmp_path / "hf", checkpoint=tmp_path / "checkpoint.safetensors")
    export_checkpoint(out, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(
        torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in half.items()
    )
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("wrapping", ["module", "training", "both"])
def test_wrapped_checkpoints_are_understood(wrapping: str, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(CHECKPOINT)
    if wrapping in ("module", "both"):
        state = {f"module.{name}": t for name, t in state.items()}
    if wrapping in ("training", "both"):
        state = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(state, tmp_path / "checkpoint.pt")
    out = convert(tmp_path / "hf", checkpoint=tmp_path / "checkpoint.pt")
    export_checkpoint(out, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], t) for name, t in CHECKPOINT.items())


def test_a_release_in_one_directory_is_imported_by_the_adapter(tmp_path: Path) -> None:
    source = tmp_path / "release"
    language_model(source / "language_model", LANGUAGE_MODEL)
    torch.save(CHECKPOINT, source / "checkpoint.pt")
    plain = convert(tmp_path / "plain")
    adapter = OpenFlamingoAdapter()
    with pytest.raises(KueaError, match="activation"):
        adapter.import_released(
            source,
            tmp_path / "out",
            tower=str(openflamingo_dir() / "vision" / "visual.safetensors"),
            command=None,
        )
    shutil.copytree(_tower_directory(plain, tmp_path), source / "vision_tower")
    adapter.import_released(source, tmp_path / "out", tower=None, command="the command")
    for file in plain.glob("model-*.safetensors"):
        expected, found = load_file(file), load_file(tmp_path / "out" / file.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], t) for name, t in expected.items())
    record = json.loads((tmp_path / "out" / "kuea.json").read_text())
    assert record["command"] == "the command"
    assert record["adapter"] == "openflamingo"
    with pytest.raises(UserError, match="not laid out as expected"):
        adapter.import_released(plain, tmp_path / "other", tower=None, command=None)


def _tower_directory(model_dir: Path, tmp_path: Path) -> Path:
    model: Any = OpenFlamingoForConditionalGeneration.from_pretrained(model_dir)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


FIRST = "perceiver.layers.0.0.to_q.weight"
WIDTH = index()["config"]["language_model"]["d_model"]
EMBEDDING = "transformer.wte.weight"
LAYER = "transformer.blocks.0.attn.q_ln.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(CHECKPOINT, FIRST), rf"lacks tensors, 1 of them, such as {FIRST}"),
        (CHECKPOINT | {"extra.weight": torch.ones(1)}, r"unknown tensors, 1 .* extra\.weight"),
        (CHECKPOINT | {FIRST: torch.ones(3, 3)}, r"attention\.q_proj\.weight has shape \(3, 3\)"),
        (without(CHECKPOINT, "perceiver.latents"), r"lacks perceiver\.latents"),
        (CHECKPOINT | {f"module.{FIRST}": torch.ones(1)}, rf"holds both .*{FIRST}"),
    ],
    ids=["missing", "unknown", "shape", "another model", "twice"],
)
def test_checkpoints_that_are_not_exact_are_refused(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "checkpoint.safetensors")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "hf", checkpoint=tmp_path / "checkpoint.safetensors")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        (without(LANGUAGE_MODEL, LAYER), {}, rf"lacks tensors, 1 of them, such as {LAYER}"),
        (without(LANGUAGE_MODEL, EMBEDDING), {}, rf"lacks {EMBEDDING}"),
        (LANGUAGE_MODEL | {EMBEDDING: torch.ones(8, 4)}, {}, "is 4 wide, config.json says"),
        (LANGUAGE_MODEL | {"lm_head.weight": torch.ones(1)}, {}, r"unknown tensors.*lm_head"),
        (LANGUAGE_MODEL, {"d_model": 2 * WIDTH}, f"language model's width is {2 * WIDTH}"),
        (LANGUAGE_MODEL, {"n_layers": 1}, "gated blocks before the decoder layers"),
        (LANGUAGE_MODEL, {"model_type": "gpt_neox"}, "type 'gpt_neox'; only mosaic_gpt"),
        (LANGUAGE_MODEL, {"attn_clip_qkv": 6}, "attn_clip_qkv is 6"),
        (LANGUAGE_MODEL, {"alibi": False}, "alibi is False"),
        (LANGUAGE_MODEL, {"attn_qk_ln": False}, r"unknown tensors, .*k_ln\.weight"),
    ],
    ids=[
        "missing",
        "embedding",
        "embedding width",
        "unknown",
        "width",
        "layers",
        "kind",
        "clip",
        "alibi",
        "norms",
    ],
)
def test_language_models_that_do_not_fit_are_refused(
    state: dict[str, Tensor], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = language_model(tmp_path / "lm", state, **settings)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "hf", language_model=directory)
    assert not (tmp_path / "hf").exists()


def test_a_tower_of_another_width_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    wide = CLIPVisionConfig(
        hidden_size=2 * VISION["width"],
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(wide).save_pretrained(tmp_path / "tower")
    with pytest.raises(
        UserError, match=rf"tower's width is {2 * VISION['width']}, the checkpoint was trained with"
    ):
        convert(tmp_path / "hf", tower=tmp_path / "tower", activation=None, heads=None)


def test_a_tokenizer_of_another_length_is_refused(tmp_path: Path) -> None:
    directory = language_model(tmp_path / "lm", LANGUAGE_MODEL)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    length = index()["config"]["tokenizer_length_before_special_tokens"]
    tokenizer["model"]["vocab"]["surplus"] = length
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"has {length + 4} tokens .* the checkpoint {length + 3}"):
        convert(tmp_path / "hf", tokenizer=directory)
