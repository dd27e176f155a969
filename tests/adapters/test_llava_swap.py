from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
)

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.swapping import swap_tower, swap_tower_files, tower_fingerprint_of
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

ADAPTER = LlavaAdapter()
PREFIXES = [
    "vision_tower.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
]


def make_tower(base: Path, out: Path, seed: int = 5, **changes: Any) -> Tower:
    config = json.loads((base / "config.json").read_text())["vision_config"] | changes
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return load_tower(out)


@pytest.fixture(scope="module")
def tower(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Tower:
    return make_tower(tiny_llava, tmp_path_factory.mktemp("tower"))


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = LlavaForConditionalGeneration
    model, report = loader.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image_id = model.config.image_token_id
    ids = torch.tensor([[1, 300, *[image_id] * 16, 301, 302]])
    pixels = torch.randn(1, 3, 16, 16, generator=generator).to(model.dtype)
    with torch.inference_mode():
        output: Tensor = model(input_ids=ids, pixel_values=pixels).logits.float()
    return output


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_files_memory_and_by_hand_agree(
    variant: Callable[..., Path], tower: Tower, tmp_path: Path, prefix: str, shards: int
) -> None:
    base, out = variant(prefix=prefix, shards=shards), tmp_path / "out"
    before = hashes(base)
    receipt = swap_tower_files(base, tower, out, adapter=ADAPTER)
    assert hashes(base) == before
    assert receipt.key_prefix == prefix
    assert receipt.fingerprint_after == tower.fingerprint
    assert tower_fingerprint_of(out, ADAPTER) == tower.fingerprint

    from_files = load(out)
    in_memory = load(base)
    memory_receipt = swap_tower(in_memory, tower, ADAPTER)
    by_hand = load(base)
    original = logits(by_hand)
    state = {k: v for k, v in tower.canonical_state().items() if k != "visual_projection.weight"}
    by_hand.model.vision_tower.load_state_dict(state)

    expected = logits(by_hand)
    assert (expected - original).abs().max() > 1e-2
    assert (logits(from_files) - expected).abs().max() <= 1e-5
    assert (logits(in_memory) - expected).abs().max() <= 1e-5
    assert memory_receipt.fingerprint_before == receipt.fingerprint_before
    assert memory_receipt.fingerprint_after == receipt.fingerprint_after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_keeps_its_dtype(
    variant: Callable[..., Path], tower: Tower, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, out = variant(dtype=dtype, shards=2), tmp_path / "out"
    receipt = swap_tower_files(base, tower, out, adapter=ADAPTER)
    name = str(dtype).removeprefix("torch.")
    assert receipt.dtype == name
    rounded = fingerprint_state(tower.model.state_dict(), rounded_to=dtype)
    assert receipt.fingerprint_after == rounded != tower.fingerprint
    recorded = json.loads((out / "kuea.json").read_text())["tower"]["fingerprints"]
    for loaded in ("float32", "float16", "bfloat16"):
        runtime = ADAPTER.open_runtime(out, dtype=loaded, device="cpu")
        assert fingerprint_state(runtime.vision_state()) == recorded[loaded]
    model = load(base, dtype)
    swap_tower(model, tower, ADAPTER)
    assert (logits(model) - logits(load(out, dtype))).abs().max() <= 1e-5


@pytest.mark.parametrize("shards", [1, 4])
def test_swapping_the_original_back_restores_every_weight_file(
    variant: Callable[..., Path], tower: Tower, tmp_path: Path, shards: int
) -> None:
    base = variant(shards=shards)
    model = load(base)
    original: Any = CLIPVisionModelWithProjection(model.config.vision_config)
    original.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    original.save_pretrained(tmp_path / "original")
    first = swap_tower_files(base, tower, tmp_path / "one", adapter=ADAPTER)
    second = swap_tower_files(
        tmp_path / "one", load_tower(tmp_path / "original"), tmp_path / "two", adapter=ADAPTER
    )
    assert second.fingerprint_after == first.fingerprint_before
    assert second.fingerprint_before == first.fingerprint_after
    restored = hashes(tmp_path / "two")
    history = json.loads((tmp_path / "two" / "kuea.json").read_text())["history"]
    assert [entry["replaced"]["fingerprint_after"] for entry in history] == [
        first.fingerprint_after
    ]
    del restored["kuea.json"], restored["README.md"]
    assert restored == hashes(base)


def test_untouched_tensors_and_metadata_are_kept(
    variant: Callable[..., Path], tower: Tower, tmp_path: Path
) -> None:
    base, out = variant(prefix="vision_tower.vision_model."), tmp_path / "out"
    swap_tower_files(base, tower, out, adapter=ADAPTER)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("vision_tower.vision_model.") for name in changed)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 48}, "its width is 48, the base asks for 32"),
        ({"patch_size": 8}, "its patch size is 8, the base asks for 4"),
        ({"image_size": 24}, "its image size is 24, the base asks for 16"),
        ({"num_hidden_layers": 2}, "its number of layers is 2, the base asks for 3"),
        ({"num_attention_heads": 8}, "its number of heads is 8, the base asks for 4"),
        ({"intermediate_size": 96}, "its MLP width is 96, the base asks for 64"),
        ({"hidden_act": "gelu"}, "its activation is gelu, the base asks for quick_gelu"),
        ({"layer_norm_eps": 1e-6}, "its layer norm epsilon is 1e-06"),
    ],
)
def test_tower_that_does_not_fit_is_refused_before_writing(
    tiny_llava: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    other = make_tower(tiny_llava, tmp_path / "tower", **changes)
    with pytest.raises(TowerMismatch, match=words):
        swap_tower_files(tiny_llava, other, tmp_path / "out", adapter=ADAPTER)
    model = load(tiny_llava)
    before = logits(model)
    with pytest.raises(TowerMismatch, match=words):
        swap_tower(model, other, ADAPTER)
    assert torch.equal(logits(model), before)
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_runtime_uses_the_new_tower(tiny_llava: Path, tower: Tower, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swap_tower_files(tiny_llava, tower, out, adapter=ADAPTER, command="kuea-mllm swap")
    ADAPTER.check_base(out)
    runtime = ADAPTER.open_runtime(out, dtype="float32", device="cpu")
    assert fingerprint_state(runtime.vision_state()) == tower.fingerprint
