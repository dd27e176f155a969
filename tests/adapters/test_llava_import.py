"""From the authors' layout to the Hugging Face form: what is kept, accounted for and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llava import (
    PREFIX,
    TEXT,
    VISION,
    language_state,
    make_original,
    make_tower,
    tower_body,
    vocabulary,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from kuea_mllm.adapters.base import ChatRequest, MLLMImporter
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.import_original import import_original
from kuea_mllm.adapters.llava.original import describe_tower
from kuea_mllm.adapters.llava.original_weights import new_name
from kuea_mllm.adapters.llava.prompt import build_prompt
from kuea_mllm.errors import OutputError, TowerMismatch, UserError

KNOWN = len(vocabulary())


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tower") / "clip")


@pytest.fixture(scope="module")
def source(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not modify."""
    return make_original(tmp_path_factory.mktemp("source") / "llava", tower)


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "hf"
    import_original(source, out, command="kuea-mllm convert")
    return out


def old_name(name: str) -> str:
    """The original name of a tensor of language model or projector; undoes `new_name`."""
    return {new_name(original): original for original in language_state()}[name]


def written(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(directory: Path) -> Any:
    loader: Any = LlavaForConditionalGeneration
    model, report = loader.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "named"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_keeps_its_bits(
    tower: Path, tmp_path: Path, inside: bool, shards: int, pickled: bool, dtype: torch.dtype
) -> None:
    form: dict[str, Any] = {"inside": inside, "shards": shards, "pickled": pickled, "dtype": dtype}
    # Where the tower is trained with the rest, the tower inside is the one that counts.
    source = make_original(tmp_path / "source", tower, **form)
    before = hashes(source)
    import_original(source, tmp_path / "out")
    assert hashes(source) == before
    state = written(tmp_path / "out")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    body = {n.removeprefix("vision_tower.vision_model."): t for n, t in state.items()}
    expected = {old_name(n): t for n, t in state.items() if not n.startswith("vision_tower.")}
    for name, tensor in tower_body(tower).items():
        assert torch.equal(body[name], tensor.to(dtype)), name
    assert expected.keys() == language_state().keys()
    for name, tensor in language_state().items():
        assert torch.equal(expected[name][: len(tensor)], tensor.to(dtype)), name
    model = load(tmp_path / "out")
    assert model.dtype == dtype


def test_tower_lies_in_a_file_of_its_own(result: Path) -> None:
    files = {path.name: list(load_file(path)) for path in result.glob("*.safetensors")}
    with_tower = [names for names in files.values() if any("vision_tower" in n for n in names)]
    assert len(files) == 2
    assert len(with_tower) == 1
    assert all(name.startswith("vision_tower.") for name in with_tower[0])
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written(result).values())


def test_configuration_states_every_field(result: Path) -> None:
    raw = json.loads((result / "config.json").read_text())
    config = load(result).config
    for key, value in TEXT.items():
        if key != "rope_theta":
            assert getattr(config.text_config, key) == raw["text_config"][key] == value
    assert config.text_config.rope_parameters["rope_theta"] == 20000.0
    for key, value in VISION.items():
        assert getattr(config.vision_config, key) == raw["vision_config"][key] == value
    assert config.vision_config.hidden_act == "quick_gelu"
    assert (raw["image_token_index"], raw["pad_token_id"]) == (KNOWN, KNOWN + 1)
    assert raw["text_config"]["vocab_size"] == 384
    assert (raw["vision_feature_layer"], raw["vision_feature_select_strategy"]) == (-2, "default")
    assert raw["image_seq_length"] == 16


def test_rows_without_text_are_never_generated(result: Path) -> None:
    state = written(result)
    assert not state["language_model.model.embed_tokens.weight"][KNOWN:].any()
    generation = json.loads((result / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(KNOWN, 384))
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, KNOWN + 1)
    assert "do_sample" not in generation


def test_filling_rows_do_not_win_where_all_logits_are_negative(tower: Path, tmp_path: Path) -> None:
    head = 1 + 0.1 * torch.randn(KNOWN, 24)
    source = make_original(tmp_path / "source", tower, extra={"lm_head.weight": head})
    import_original(source, tmp_path / "out")
    logits = written(tmp_path / "out")["language_model.lm_head.weight"] @ -torch.ones(24)
    # As zero rows would.
    assert float(logits.max()) < 0
    assert len(logits) == 384
    assert int(logits.argmax()) < KNOWN


def test_processor_writes_a_placeholder_per_patch(result: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(result)
    batch = processor(text="USER: <image>\nHi", images=Image.new("RGB", (30, 20)))
    assert batch["input_ids"][0].count(KNOWN) == 16
    assert processor.image_processor.do_pad
    # A wide picture is padded to a square, not cropped.
    assert batch["pixel_values"][0].shape == (3, 16, 16)


def test_chat_template_is_the_format_of_the_training(result: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(result)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    one = tokenizer.apply_chat_template(turns, **options)
    assert one == f"<s>{build_prompt('What is it?', image_count=1)}"
    turns += [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(turns, **options) == (
        f"{one} A cat.</s>USER: Why? ASSISTANT:"
    )


def test_result_answers_questions(result: Path, source: Path) -> None:
    adapter = LlavaAdapter()
    assert isinstance(adapter, MLLMImporter)
    runtime = adapter.open_runtime(result, dtype="float32", device="cpu")
    request = ChatRequest("What is it?", (Image.new("RGB", (20, 10), "red"),))
    assert len(runtime.generate([request], max_new_tokens=4)) == 1
    with pytest.raises(UserError, match=r"(?s)original layout.*--mllm llava"):
        adapter.open_runtime(source, dtype="float32", device="cpu")


def test_record_names_the_tower_and_the_source(result: Path, source: Path) -> None:
    record = json.loads((result / "kuea.json").read_text())
    assert (record["kind"], record["adapter"]) == ("mllm", "llava")
    assert record["command"] == "kuea-mllm convert"
    assert record["base"]["path"] == str(source.resolve())
    assert record["imported"]["config"]["model_type"] == "llava_llama"
    from kuea_mllm.swapping import tower_fingerprint_of

    assert record["tower"]["fingerprint"] == tower_fingerprint_of(result, LlavaAdapter())


def test_result_can_be_shared(tower: Path, tmp_path: Path) -> None:
    from kuea_mllm.share import check_upload

    source = make_original(tmp_path / "someone" / "llava", tower)
    (source / "README.md").write_text("---\nlicense: llama2\ninference: false\n---\n# LLaVA\n")
    import_original(source, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert 'license: "llama2"' in card
    assert "# llava in Hugging Face form" in card
    assert str(tmp_path) not in card
    with pytest.raises(UserError, match="does not state base_model"):
        check_upload(tmp_path / "hf")
    upload = check_upload(tmp_path / "hf", base_model="liuhaotian/llava-v1.5-7b")
    assert upload.fingerprint in card
    assert str(tmp_path) not in str(upload.files["kuea.json"])


def test_buffers_of_older_releases_are_checked_and_dropped(tower: Path, tmp_path: Path) -> None:
    width = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    frequencies = 20000.0 ** -(torch.arange(0, width, 2).float() / width)
    rotary = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = {
        rotary: frequencies.half(),
        f"{PREFIX}embeddings.position_ids": torch.arange(17)[None],
    }
    import_original(make_original(tmp_path / "good", tower, extra=extra), tmp_path / "out")
    assert not [name for name in written(tmp_path / "out") if "inv_freq" in name or "ids" in name]
    wrong = make_original(tmp_path / "wrong", tower, extra={rotary: frequencies * 2})
    with pytest.raises(UserError, match=r"inv_freq is not what rope_theta 20000"):
        import_original(wrong, tmp_path / "other")


def test_spare_rows_of_the_vocabulary_are_kept(tower: Path, tmp_path: Path) -> None:
    spare = {name: torch.randn(340, 24) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    source = make_original(tmp_path / "source", tower, vocab_size=340, extra=spare)
    import_original(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # The first ids that no text of the tokenizer has.
    assert (config["image_token_index"], config["pad_token_id"]) == (KNOWN, KNOWN + 1)
    state = written(tmp_path / "out")
    for name, tensor in spare.items():
        found = next(t for key, t in state.items() if old_name(key) == name)
        assert torch.equal(found[:340], tensor)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"][0] == KNOWN


def test_tensor_in_two_files_is_refused(tower: Path, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", tower, shards=3)
    first, last = (source / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    save_file(load_file(last) | {"lm_head.weight": load_file(first)["lm_head.weight"]}, last)
    with pytest.raises(UserError, match=r"holds lm_head\.weight twice, the second time in model-0"):
        import_original(source, tmp_path / "out")


def test_scaled_positions_are_kept(tower: Path, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    source = make_original(tmp_path / "source", tower, rope_scaling=scaling)
    import_original(source, tmp_path / "out")
    parameters = load(tmp_path / "out").config.text_config.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == ("linear", 2.0)
    assert parameters["rope_theta"] == 20000.0


def test_tied_output_is_not_written(tower: Path, tmp_path: Path) -> None:
    embedding = language_state()["model.embed_tokens.weight"]
    tied = make_original(
        tmp_path / "tied",
        tower,
        tie_word_embeddings=True,
        extra={"lm_head.weight": embedding.clone()},
    )
    import_original(tied, tmp_path / "out")
    assert "language_model.lm_head.weight" not in written(tmp_path / "out")
    model = load(tmp_path / "out")
    assert torch.equal(model.get_output_embeddings().weight[:KNOWN], embedding)


BROKEN: dict[str, dict[str, Any]] = {
    r"lacks 1 tensors .* first model\.mm_projector\.2\.bias": {
        "leave_out": ("model.mm_projector.2.bias",)
    },
    r"holds 1 tensors .* first model\.image_newline": {
        "extra": {"model.image_newline": torch.zeros(24)}
    },
    r"model\.norm\.weight has shape \(25,\), config\.json asks for \(24,\)": {
        "extra": {"model.norm.weight": torch.zeros(25)}
    },
    r"unmerged LoRA weights, such as model\.layers\.0\.self_attn\.q_proj\.lora_A": {
        "extra": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 24)}
    },
    r"no vision tower in the weights .* pre_layrnorm\.bias is missing": {
        "leave_out": (f"{PREFIX}pre_layrnorm.bias",)
    },
    r"holds 1 tensors that its tower does not have, first model\.vision_tower\.extra": {
        "extra": {"model.vision_tower.extra": torch.zeros(1)}
    },
    r"model\.norm\.weight is torch\.int8, which is quantised": {
        "extra": {"model.norm.weight": torch.ones(24, dtype=torch.int8)}
    },
    "mm_projector_type is 'linear'": {"mm_projector_type": "linear"},
    r"mm_projector_type is 'linear' \(not stated\)": {"mm_projector_type": "absent"},
    "mm_patch_merge_type is 'spatial_unpad'": {"mm_patch_merge_type": "spatial_unpad"},
    "image_aspect_ratio is 'anyres'": {"image_aspect_ratio": "anyres"},
    "mm_use_im_start_end is True": {"mm_use_im_start_end": True},
    r"mm_use_im_patch_token is True \(not stated\)": {"mm_use_im_patch_token": "absent"},
    "s2 is True": {"s2": True},
    "quantization_config is": {"quantization_config": {"bits": 4}},
    "mm_new_trick is 3, which is not known": {"mm_new_trick": 3},
    "mm_vision_select_layer is None": {"mm_vision_select_layer": None},
    "mm_vision_select_feature is 'cls'": {"mm_vision_select_feature": "cls"},
    "only LlavaLlamaForCausalLM": {"architectures": ["LlavaMptForCausalLM"]},
    "not LLaVA in its original layout": {"model_type": "llava_mistral"},
    r"the tokenizer of .* has 333 tokens, config\.json says vocab_size 300": {
        "vocab_size": 300,
        "extra": {
            "lm_head.weight": torch.ones(300, 24),
            "model.embed_tokens.weight": torch.ones(300, 24),
        },
    },
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_cannot_be_expressed_is_refused(words: str, tower: Path, tmp_path: Path) -> None:
    broken = make_original(tmp_path / "source", tower, **BROKEN[words])
    with pytest.raises(UserError, match=words):
        import_original(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def only_projector(source: Path) -> None:
    (source / "model.safetensors").rename(source / "mm_projector.bin")


def lora(source: Path) -> None:
    (source / "non_lora_trainables.bin").touch()


def no_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def cut_short(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (only_projector, r"only a projector \(mm_projector\.bin\)"),
        (lora, "LoRA weights of LLaVA, not a whole model"),
        (no_weights, "holds no weights"),
        (no_tokenizer, "no tokenizer"),
        (cut_short, r"model\.safetensors is not a safetensors file or is cut short"),
    ],
)
def test_incomplete_sources_are_named(
    damage: Callable[[Path], None], words: str, source: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    damage(broken)
    with pytest.raises(UserError, match=words):
        import_original(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        import_original(source, tmp_path / "out")
    with pytest.raises(OutputError, match="inside of the source"):
        import_original(source, source / "hf")


def test_tower_in_the_files_must_be_the_named_one(tmp_path: Path) -> None:
    named, other = make_tower(tmp_path / "named"), make_tower(tmp_path / "other", seed=5)
    source = make_original(tmp_path / "source", other, mm_vision_tower=str(named))
    with pytest.raises(UserError, match=r"holds another vision tower than .*named"):
        import_original(source, tmp_path / "out")
    import_original(source, tmp_path / "asked", vision_tower=named)
    trained = make_original(
        tmp_path / "trained", other, mm_vision_tower=str(named), unfreeze_mm_vision_tower=True
    )
    import_original(trained, tmp_path / "inside")
    name = "vision_tower.vision_model.post_layernorm.weight"
    for out, tower in (("asked", named), ("inside", other)):
        expected = tower_body(tower)["post_layernorm.weight"]
        assert torch.equal(written(tmp_path / out)[name], expected), out


def test_tower_that_is_not_here_is_asked_for(tower: Path, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", tower, mm_vision_tower="someone/tower")
    with pytest.raises(UserError, match=r"names the vision tower 'someone/tower'.*not known"):
        import_original(source, tmp_path / "out")
    import_original(source, tmp_path / "out", vision_tower=tower)
    narrow = {"extra": {"model.mm_projector.0.weight": torch.ones(24, 30)}}
    wrong = make_original(tmp_path / "wrong", tower, inside=False, **narrow)
    with pytest.raises(TowerMismatch, match=r"is 32 wide, the projector of .* takes 30"):
        import_original(wrong, tmp_path / "other")


def test_published_towers_are_known_without_files() -> None:
    for name, side in (
        ("openai/clip-vit-large-patch14", 224),
        ("openai/clip-vit-large-patch14-336", 336),
    ):
        config = describe_tower(name, Path("config.json")).config
        assert (config["image_size"], config["hidden_size"]) == (side, 1024)
        assert (config["num_hidden_layers"], config["hidden_act"]) == (24, "quick_gelu")


def test_keys_without_counterpart_are_said(
    tower: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_original(tmp_path / "source", tower, favourite_colour="blue")
    import_original(source, tmp_path / "out")
    assert "left out: favourite_colour" in caplog.text


@pytest.mark.parametrize("setting", ["pad", "square", "absent"])
def test_padding_of_pictures_follows_the_original(
    setting: str, tower: Path, tmp_path: Path
) -> None:
    source = make_original(tmp_path / "source", tower, image_aspect_ratio=setting)
    import_original(source, tmp_path / "out")
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert images["do_pad"] is (setting == "pad")
    assert images["size"] == {"shortest_edge": 16}
    assert images["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_class_token_is_kept_where_the_original_reads_it(tower: Path, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", tower, mm_vision_select_feature="cls_patch")
    import_original(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == "full"
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor(text="<image>", images=Image.new("RGB", (16, 16)))
    assert batch["input_ids"][0].count(KNOWN) == config["image_seq_length"] == 17
