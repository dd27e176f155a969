"""LLaVA-1.5 with mixed image tokens: what is mixed, and that it is an adapter like the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig
from transformers import Dinov2WithRegistersModel as RegistersModel

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.conformance import problems_of, tuner_problems_of
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava_mof.adapter import LlavaMofAdapter
from kuea_mllm.errors import OutputError, TowerMismatch, UserError
from kuea_mllm.planning.tuning_memory import model_sizes
from kuea_mllm.planning.tuning_models import find_mllm
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower
from kuea_mllm.tuning.quantised import quantization_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARED = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_expert(
    out: Path, *, width: int, patch: int = 4, grid: int = 4, registers: bool = False
) -> Path:
    torch.manual_seed(7)
    side = grid * patch
    settings: dict[str, Any] = {**SHARED, "hidden_size": width, "patch_size": patch}
    settings["image_size"] = side
    model: Any = (
        RegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=3))
        if registers
        else Dinov2Model(Dinov2Config(**settings))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(out)
    pixels = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": MEAN,
        "image_std": STD,
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(pixels))
    return out


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_expert(tmp_path_factory.mktemp("expert") / "dinov2", width=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width, registers, smaller patches, and a larger grid of them when it was trained."""
    out = tmp_path_factory.mktemp("expert") / "dinov2_registers"
    return write_expert(out, width=40, patch=2, grid=6, registers=True)


def build(llava: Path, expert: Path, out: Path, **config: Any) -> Path:
    LlavaMofAdapter().import_released(llava, out, tower=str(expert), command="convert")
    if config:
        content = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(content))
    return out


def load(directory: Path) -> Any:
    adapter = LlavaMofAdapter()
    return adapter.load_for_tuning(directory, dtype="float32", device="cpu")


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["expert", "wide"])
def test_mixture_conforms(
    kind: str, tiny_llava: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = build(tiny_llava, request.getfixturevalue(kind), tmp_path / "mof")
    assert problems_of(LlavaMofAdapter(), base) == []
    assert tuner_problems_of(LlavaMofAdapter(), base) == []


def test_clip_alone_is_the_llava_that_it_was_made_of(
    tiny_llava: Path, expert: Path, tmp_path: Path, pixels: Tensor
) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof", clip_share=1.0)
    llava = LlavaAdapter()
    original = llava.load_for_tuning(tiny_llava, dtype="float32", device="cpu")
    with torch.no_grad():
        expected = llava.image_features(original, pixels)
        found = LlavaMofAdapter().image_features(load(base), pixels)
    assert torch.equal(found, expected)
    requests = [ChatRequest("What is this?", (Image.new("RGB", (20, 12), "red"),))]
    answers = [
        adapter.open_runtime(directory, dtype="float32", device="cpu").generate(
            requests, max_new_tokens=6
        )
        for adapter, directory in ((llava, tiny_llava), (LlavaMofAdapter(), base))
    ]
    assert answers[0] == answers[1]


def test_tokens_are_the_weighted_sum_of_both_encoders(
    tiny_llava: Path, expert: Path, tmp_path: Path, pixels: Tensor
) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof", clip_share=0.25)
    tower = LlavaAdapter().load_for_tuning(tiny_llava, dtype="float32", device="cpu")
    slot = LlavaAdapter().tower_slot(tiny_llava)
    clip_mean, clip_std = (torch.tensor(v).view(3, 1, 1) for v in (slot.mean, slot.std))
    pictures = pixels * clip_std + clip_mean
    own = (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    dinov2: Any = Dinov2Model.from_pretrained(expert)
    with torch.no_grad():
        clip = tower.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        # Before the final norm, which transformers applies to `last_hidden_state` only.
        dino = dinov2(own, output_hidden_states=True).hidden_states[-1]
        found = load(base).model.image_tokens(pixels)
    expected = 0.25 * clip[:, 1:] + 0.75 * dino[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pixels_of_clip_can_be_given_to_both_as_the_released_code_does(
    tiny_llava: Path, expert: Path, tmp_path: Path, pixels: Tensor
) -> None:
    base = build(
        tiny_llava, expert, tmp_path / "mof", clip_share=0.0, expert_mean=None, expert_std=None
    )
    dinov2: Any = Dinov2Model.from_pretrained(expert)
    with torch.no_grad():
        expected = dinov2(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        found = load(base).model.image_tokens(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_another_width_gets_a_map_that_is_trained_with_the_projector(
    tiny_llava: Path, wide: Path, tmp_path: Path, pixels: Tensor
) -> None:
    base = build(tiny_llava, wide, tmp_path / "mof")
    parts = LlavaMofAdapter().tuning_parts(base)
    assert parts.projector == ("model.multi_modal_projector", "model.expert_projection")
    model = load(base)
    assert model.model.expert_projection.weight.shape == (32, 40)
    tokens = model.model.image_tokens(pixels)
    assert tokens.shape == (3, 16, 32)


@pytest.mark.parametrize("kind", ["expert", "wide"])
def test_plan_counts_both_encoders_of_the_loaded_model(
    kind: str, tiny_llava: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = build(tiny_llava, request.getfixturevalue(kind), tmp_path / "mof")
    found = find_mllm(base)
    assert (found.adapter, found.tokens_per_image, found.image_size) == ("llava_mof", 16, 16)
    sizes, real = model_sizes(found), load(base)

    def count(*paths: str) -> int:
        return sum(p.numel() for path in paths for p in real.get_submodule(path).parameters())

    assert sizes.total == sum(parameter.numel() for parameter in real.parameters())
    assert sizes.tower == count("model.vision_tower")
    assert sizes.other_encoders == count("model.expert_tower")
    assert sizes.projector == count("model.multi_modal_projector", "model.expert_projection")
    assert sizes.linear + sizes.rest == count("model.language_model", "lm_head")


def test_both_encoders_stay_as_they_are_in_a_quantised_tuning(
    tiny_llava: Path, expert: Path, tmp_path: Path
) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof")
    parts = LlavaMofAdapter().tuning_parts(base)
    config = quantization_config("nf4", parts, dtype=torch.float32)
    assert {"model.vision_tower", "model.expert_tower"} <= set(config.llm_int8_skip_modules)
    model: Any = LlavaMofAdapter().load_for_tuning(
        base, dtype="float32", device="cpu", quantization=config
    )
    assert model.model.expert_tower.encoder.layer[0].mlp.fc1.weight.is_floating_point()
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.is_floating_point()


def test_files_of_the_llava_are_kept_and_not_copied(
    variant: Callable[..., Path], expert: Path, tmp_path: Path
) -> None:
    source = variant(shards=2)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    base = build(source, expert, tmp_path / "mof")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    shard = "model-00001-of-00002.safetensors"
    assert (base / shard).samefile(source / shard)
    assert problems_of(LlavaMofAdapter(), base) == []


def test_tower_can_be_swapped(tiny_llava: Path, expert: Path, tmp_path: Path) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof")
    stock = LlavaAdapter().load_for_tuning(tiny_llava, dtype="float32", device="cpu")
    tower_dir = tmp_path / "tower"
    stock.model.vision_tower.save_pretrained(tower_dir)
    for name in ("preprocessor_config.json",):
        shutil.copyfile(tiny_llava / name, tower_dir / name)
    tower = load_tower(tower_dir)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.mul_(1.1)
    save_tower(tower, tmp_path / "aligned", manifest={})
    aligned = load_tower(tmp_path / "aligned")
    swap_tower_files(
        base, aligned, tmp_path / "out", adapter=LlavaMofAdapter(), measure_drift=False
    )
    runtime = LlavaMofAdapter().open_runtime(tmp_path / "out", dtype="float32", device="cpu")
    own = aligned.model.state_dict()
    for name, tensor in runtime.vision_state().items():
        torch.testing.assert_close(tensor, own[name])


def test_description_says_what_is_mixed(tiny_llava: Path, expert: Path, tmp_path: Path) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof", clip_share=0.75)
    runtime = LlavaMofAdapter().open_runtime(base, dtype="float32", device="cpu")
    described = runtime.describe()
    assert (described["clip_share"], described["expert"]) == (0.75, "dinov2")


def test_second_encoder_has_to_be_named(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a second encoder"):
        LlavaMofAdapter().import_released(tiny_llava, tmp_path / "x", tower=None, command=None)
    assert not (tmp_path / "x").exists()


def test_second_encoder_of_another_kind_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    llava: Any = LlavaAdapter().load_for_tuning(tiny_llava, dtype="float32", device="cpu")
    llava.model.vision_tower.save_pretrained(other)
    shutil.copyfile(tiny_llava / "preprocessor_config.json", other / "preprocessor_config.json")
    with pytest.raises(TowerMismatch, match="is a clip_vision_model"):
        build(tiny_llava, other, tmp_path / "mof")


def test_existing_output_is_refused(tiny_llava: Path, expert: Path, tmp_path: Path) -> None:
    (tmp_path / "mof").mkdir()
    (tmp_path / "mof" / "mine").write_text("")
    with pytest.raises(OutputError):
        build(tiny_llava, expert, tmp_path / "mof")


def test_share_out_of_range_is_named(tiny_llava: Path, expert: Path, tmp_path: Path) -> None:
    base = build(tiny_llava, expert, tmp_path / "mof", clip_share=1.5)
    with pytest.raises(UserError, match=r"config\.json: clip_share is 1\.5"):
        LlavaMofAdapter().tower_slot(base)


def test_plain_llava_is_not_taken_for_a_mixture(tiny_llava: Path) -> None:
    with pytest.raises(UserError, match="is no LLaVA with mixed tokens"):
        LlavaMofAdapter().check_base(tiny_llava)
