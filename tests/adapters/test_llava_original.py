"""Swaps in the authors' layout, whose loader takes the tower from where `config.json` points."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llava import PREFIX, language_state, make_original, make_tower, tower_body
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModel

from kuea_mllm.adapters.base import Tap
from kuea_mllm.adapters.conformance import problems_of as problems_of_adapter
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.import_original import import_original
from kuea_mllm.adapters.named_tower import local_directory
from kuea_mllm.errors import UserError
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.swapping.reference import check_reference, tower_inside
from kuea_mllm.swapping.sources import load_any_tower
from kuea_mllm.swapping.verify import verify_model
from kuea_mllm.towers.reading.load import load_tower

ADAPTER = LlavaAdapter()
FORMS = {
    "safetensors": {},
    "safetensors shards": {"shards": 3},
    "bin": {"pickled": True},
    "bin shards": {"pickled": True, "shards": 3},
    "half precision": {"pickled": True, "shards": 3, "dtype": torch.float16},
    "tower elsewhere": {"inside": False},
    "tower elsewhere, bin": {"inside": False, "pickled": True},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("stock") / "clip")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tuned") / "clip", seed=1)


def swap(base: Path, tower: Path, out: Path) -> Any:
    return swap_tower_files(base, load_tower(tower), out, adapter=ADAPTER, measure_drift=False)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            state |= load_file(path)
        elif path.suffix == ".bin":
            state |= torch.load(path, weights_only=True)
    return state


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pointer(directory: Path) -> str:
    value: str = json.loads((directory / "config.json").read_text())["mm_vision_tower"]
    return value


def set_pointer(directory: Path, value: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"mm_vision_tower": value}))


def test_slot_is_what_the_configuration_means(stock: Path, tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", stock)
    slot = ADAPTER.tower_slot(base)
    assert ADAPTER.recognises(json.loads((base / "config.json").read_text()))
    assert (slot.tap, slot.family) == (Tap((-2,), drops_cls=True), "clip")
    assert (slot.projector_width, slot.vision_config["num_hidden_layers"]) == (32, 3)
    assert slot.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert slot.reference is not None
    assert (slot.reference.key, slot.reference.value) == ("mm_vision_tower", str(stock))


@pytest.mark.parametrize("form", FORMS)
def test_original_layout_passes_the_conformance_suite(
    form: str, stock: Path, tmp_path: Path
) -> None:
    base = make_original(tmp_path / "base", stock, **FORMS[form])
    assert problems_of_adapter(ADAPTER, base, answers=False) == []


@pytest.mark.parametrize("form", FORMS)
def test_loader_of_the_authors_gets_the_new_tower(
    form: str, stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base = make_original(tmp_path / "base", stock, **FORMS[form])
    before, old = hashes(base), weights(base)
    receipt = swap(base, tuned, tmp_path / "out")
    assert hashes(base) == before
    assert receipt.fingerprint_after == load_tower(tuned).fingerprint

    # As the original `CLIPVisionTower.load_model` does it.
    path = Path(pointer(tmp_path / "out"))
    assert path == (tmp_path / "out" / "clip_vision_tower").resolve()
    loaded, report = CLIPVisionModel.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert CLIPImageProcessor.from_pretrained(path).size == {"shortest_edge": 16}
    state = {name.removeprefix("vision_model."): t for name, t in loaded.state_dict().items()}
    new = weights(tmp_path / "out")
    assert new.keys() == old.keys()
    for name, tensor in tower_body(tuned).items():
        assert torch.equal(state[name], tensor), name
        if PREFIX + name in old:
            assert torch.equal(new[PREFIX + name], tensor.to(old[PREFIX + name].dtype)), name
    for name in language_state():
        assert torch.equal(new[name], old[name]), name
    assert ADAPTER.check_base(tmp_path / "out") is None
    assert check_reference(tmp_path / "out", ADAPTER.tower_slot(tmp_path / "out")) == []
    assert verify_model(tmp_path / "out").problems == ()


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_share_no_weights_with_the_base(
    stock: Path, tuned: Path, tmp_path: Path, pickled: bool
) -> None:
    base, out = make_original(tmp_path / "base", stock, pickled=pickled, shards=3), tmp_path / "out"
    tower = load_tower(tuned)
    receipt = swap_tower_files(base, tower, out, adapter=ADAPTER, measure_drift=False, link=False)
    assert receipt.files_linked == ()
    shared = [path.name for path in base.iterdir() if path.samefile(out / path.name)]
    assert shared == []


def test_only_files_with_tower_weights_are_rewritten(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base = make_original(tmp_path / "base", stock, pickled=True, shards=6)
    receipt = swap(base, tuned, tmp_path / "out")
    holds_tower = {
        path.name
        for path in base.glob("*.bin")
        if any(name.startswith(PREFIX) for name in torch.load(path, weights_only=True))
    }
    assert set(receipt.files_rewritten) == holds_tower
    assert receipt.files_linked
    for name in receipt.files_linked:
        assert (tmp_path / "out" / name).samefile(base / name)
    assert (tmp_path / "out" / "pytorch_model.bin.index.json").is_file()


def test_projector_copies_and_optimiser_states_are_left_out(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base = make_original(tmp_path / "base", stock, pickled=True)
    for name in ("mm_projector.bin", "training_args.bin"):
        (base / name).write_bytes(b"x")
    receipt = swap(base, tuned, tmp_path / "out")
    assert set(receipt.files_left_out) == {"mm_projector.bin", "training_args.bin"}


def test_names_suit_the_transformers_of_the_original_code(stock: Path, tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", stock)
    bare = make_tower(tmp_path / "bare", seed=3, has_projection=False)
    swap(base, bare, tmp_path / "out")
    names = load_file(tmp_path / "out" / "clip_vision_tower" / "model.safetensors").keys()
    assert all(name.startswith("vision_model.") for name in names)
    assert check_reference(tmp_path / "out", ADAPTER.tower_slot(tmp_path / "out")) == []
    # What transformers 5 would write, and transformers 4 would not find.
    model: Any = CLIPVisionModel.from_pretrained(bare)
    shutil.rmtree(tmp_path / "out" / "clip_vision_tower")
    model.save_pretrained(tmp_path / "out" / "clip_vision_tower")
    problems = check_reference(tmp_path / "out", ADAPTER.tower_slot(tmp_path / "out"))
    assert any("starts from random weights" in line for line in problems)
    assert any("preprocessor_config.json is missing" in line for line in problems)


def test_second_swap_replaces_the_first(stock: Path, tuned: Path, tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", stock)
    swap(base, tuned, tmp_path / "one")
    receipt = swap(tmp_path / "one", stock, tmp_path / "two")
    assert receipt.fingerprint_before == load_tower(tuned).fingerprint
    assert not [name for name in receipt.files_copied if name.startswith("clip_vision_tower")]
    assert load_any_tower(tmp_path / "two").fingerprint == load_tower(stock).fingerprint
    assert weights(tmp_path / "two").keys() == weights(base).keys()
    for name, tensor in weights(base).items():
        assert torch.equal(weights(tmp_path / "two")[name], tensor), name
    assert verify_model(tmp_path / "two").problems == ()


def test_swapped_original_converts_with_its_new_tower(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base = make_original(tmp_path / "base", stock, pickled=True, shards=2)
    swap(base, tuned, tmp_path / "out")
    import_original(tmp_path / "out", tmp_path / "hf")
    record = json.loads((tmp_path / "hf" / "kuea.json").read_text())
    assert record["tower"]["fingerprint"] == load_tower(tuned).fingerprint
    assert [entry["kind"] for entry in record["history"]] == ["mllm"]
    assert verify_model(tmp_path / "hf").problems == ()


def problems_of(directory: Path) -> str:
    return "\n".join(check_reference(directory, ADAPTER.tower_slot(directory)))


def test_every_wrong_pointer_is_noticed(stock: Path, tuned: Path, tmp_path: Path) -> None:
    base, out = make_original(tmp_path / "base", stock), tmp_path / "out"
    swap(base, tuned, out)
    shutil.copytree(out, tmp_path / "copy")
    assert "another directory than the tower that lies here" in problems_of(tmp_path / "copy")
    out.rename(tmp_path / "moved")
    said = problems_of(tmp_path / "moved")
    assert "was moved or copied" in said
    assert str(tmp_path / "moved" / "clip_vision_tower") in said
    assert verify_model(tmp_path / "moved").problems
    # As the message says.
    set_pointer(tmp_path / "moved", str(tmp_path / "moved" / "clip_vision_tower"))
    assert problems_of(tmp_path / "moved") == ""
    assert verify_model(tmp_path / "moved").problems == ()


def test_stock_tower_that_would_be_fetched_again_is_noticed(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base, out = make_original(tmp_path / "base", stock, inside=False), tmp_path / "out"
    swap(base, tuned, out)
    shutil.rmtree(out / "clip_vision_tower")
    set_pointer(out, "openai/clip-vit-large-patch14-336")
    assert "would download the stock tower again" in problems_of(out)


def test_relative_pointer_is_noticed(
    stock: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = make_original(tmp_path / "base", stock), tmp_path / "out"
    swap(base, tuned, out)
    monkeypatch.chdir(out)
    set_pointer(out, "clip_vision_tower")
    assert "a relative path" in problems_of(out)


def test_other_tower_inside_of_the_files_is_noticed(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    base, out = make_original(tmp_path / "base", stock, dtype=torch.bfloat16), tmp_path / "out"
    assert check_reference(base, ADAPTER.tower_slot(base)) == []
    swap(base, tuned, out)
    assert problems_of(out) == ""
    shutil.copy(base / "model.safetensors", out / "model.safetensors")
    assert "the weight files hold another tower" in problems_of(out)
    with pytest.raises(UserError, match="holds another vision tower"):
        import_original(out, tmp_path / "hf")


def test_tower_inside_is_found_whatever_the_format(stock: Path, tmp_path: Path) -> None:
    for form, options in FORMS.items():
        base = make_original(tmp_path / form, stock, **options)
        found = tower_inside(base, ADAPTER.tower_slot(base))
        if not options.get("inside", True):
            assert found is None
            continue
        assert found is not None
        dtype: Any = options.get("dtype", torch.float32)
        assert found.keys() == tower_body(stock).keys()
        for name, tensor in tower_body(stock).items():
            assert torch.equal(found[name], tensor.to(dtype)), (form, name)


def test_trained_tower_is_swapped_in_the_weight_files(
    stock: Path, tuned: Path, tmp_path: Path
) -> None:
    trained = make_tower(tmp_path / "trained", seed=7)
    options = {"mm_vision_tower": str(stock), "unfreeze_mm_vision_tower": True}
    base = make_original(tmp_path / "base", trained, **options)
    assert ADAPTER.tower_slot(base).reference is None
    receipt = swap(base, tuned, tmp_path / "out")
    assert receipt.key_prefix == PREFIX
    assert receipt.fingerprint_before == load_tower(trained).fingerprint
    for name, tensor in tower_body(tuned).items():
        assert torch.equal(weights(tmp_path / "out")[PREFIX + name], tensor)
    pickled = make_original(tmp_path / "pickled", trained, pickled=True, **options)
    with pytest.raises(UserError, match=r"no safetensors\.\n.*--mllm llava"):
        swap(pickled, tuned, tmp_path / "other")


def test_unknown_tower_cannot_be_swapped(stock: Path, tuned: Path, tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", stock, mm_vision_tower="someone/tower")
    with pytest.raises(UserError, match="'someone/tower'"):
        swap(base, tuned, tmp_path / "out")
    scales = make_original(tmp_path / "scales", stock, s2=True)
    with pytest.raises(UserError, match="several scales"):
        swap(scales, tuned, tmp_path / "out")


def test_cache_without_weights_is_no_tower(
    stock: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many programs fetch a configuration alone, with which nothing can be compared."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(stock / name, snapshot / name)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_: str(snapshot / "config.json")
    )
    assert local_directory("own/clip") == snapshot
    assert local_directory("own/clip", with_weights=True) is None
    assert local_directory(str(snapshot), with_weights=True) == snapshot
    base = make_original(tmp_path / "base", stock, mm_vision_tower="own/clip")
    assert ADAPTER.tower_slot(base).vision_config["hidden_size"] == 32
    import_original(base, tmp_path / "hf")
    receipt = swap(base, tuned, tmp_path / "out")
    assert receipt.fingerprint_before == load_tower(stock).fingerprint
    shutil.copyfile(stock / "model.safetensors", snapshot / "model.safetensors")
    assert local_directory("own/clip", with_weights=True) == snapshot
