"""Which tower is in a directory, and what can be wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_mllm import ADAPTER, ToyAdapter, make_tower, write_base

from kuea_mllm.adapters import registry
from kuea_mllm.adapters.base import AdapterManifest
from kuea_mllm.errors import UserError
from kuea_mllm.swapping import swap_tower_files, verify_model


@pytest.fixture(autouse=True)
def toy_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = AdapterManifest("toy", "a toy", "toy_mllm:ToyAdapter")
    monkeypatch.setattr(registry, "_discover", lambda: ({"toy": manifest}, {}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    tower = make_tower(1)
    tower.manifest = {
        "kind": "tower",
        "base_tower": {"reference": "org/clip"},
        "teacher": {"reference": "org/dino"},
        "objective": {"kernel_weight": 1.0},
    }
    base = write_base(tmp_path / "base")
    swap_tower_files(
        base, tower, tmp_path / "out", adapter=ADAPTER, reference="org/llava", measure_drift=False
    )
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_untouched_result_is_what_it_claims(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", dtype=dtype)
    swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER, measure_drift=False)
    found = verify_model(tmp_path / "out", tower=make_tower(1))
    assert found.problems == ()
    assert found.is_tower
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert not verify_model(tmp_path / "out", tower=make_tower(2)).is_tower


def test_tower_is_named_in_words(tmp_path: Path, out: Path) -> None:
    assert verify_model(out).tower == "tower-1, aligned from org/clip with org/dino"
    swap_tower_files(out, make_tower(0), tmp_path / "back", adapter=ADAPTER, measure_drift=False)
    shutil.copy(out / "kuea.json", tmp_path / "back" / "kuea.json")
    assert "org/llava held before" in verify_model(tmp_path / "back").tower


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(out / "model.safetensors")
    change(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def test_changed_weights_are_found(out: Path) -> None:
    rewrite(out, lambda state: state["eye.post_layernorm.bias"].add_(1e-3))
    found = verify_model(out)
    assert not found.is_good
    assert any("changed after the swap" in problem for problem in found.problems)
    assert found.tower == "unknown"


def test_original_put_back_is_named(tmp_path: Path, out: Path) -> None:
    shutil.copy(tmp_path / "base" / "model.safetensors", out / "model.safetensors")
    found = verify_model(out)
    assert any("was replaced" in problem for problem in found.problems)
    assert "held before the swap" in found.tower


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)])
def test_changed_configuration_is_found(out: Path, key: str, value: object) -> None:
    config = json.loads((out / "config.json").read_text())
    config["vision_config"][key] = value
    (out / "config.json").write_text(json.dumps(config))
    (problem,) = verify_model(out).problems
    assert key in problem
    assert str(value) in problem


STALE = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "adapter_config.json",
    "model-q4.gguf",
]


@pytest.mark.parametrize("name", STALE)
def test_file_that_another_loader_could_take_is_found(out: Path, name: str) -> None:
    (out / name).write_text("{}")
    (problem,) = verify_model(out).problems
    assert name in problem


def test_files_that_are_no_weights_are_no_problem(out: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "notes.txt"):
        (out / name).write_text("x")
    assert verify_model(out).is_good


def test_missing_record_is_a_problem_unless_a_tower_is_asked_about(out: Path) -> None:
    (out / "kuea.json").unlink()
    (problem,) = verify_model(out).problems
    assert "there is no kuea.json" in problem
    found = verify_model(out, tower=make_tower(1))
    assert found.is_good
    assert found.tower == "tower-1, the one that was asked about"


def test_record_of_another_kind_is_a_problem(out: Path) -> None:
    (out / "kuea.json").write_text('{"kind": "tower", "fingerprint": "x"}')
    (problem,) = verify_model(out).problems
    assert "belongs to another directory" in problem


def test_record_that_is_no_object_is_named(out: Path) -> None:
    (out / "kuea.json").write_text("[]")
    with pytest.raises(UserError, match=r"kuea\.json does not hold a JSON object"):
        verify_model(out)


def test_mix_is_named_as_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    swap_tower_files(
        base, make_tower(1), tmp_path / "mix", adapter=ADAPTER, weight=0.5, measure_drift=False
    )
    found = verify_model(tmp_path / "mix")
    assert found.is_good
    assert found.tower.startswith("a mix: 0.5 of tower-1")
    assert not verify_model(tmp_path / "mix", tower=make_tower(1)).is_tower


def test_other_tap_than_at_the_swap_is_found(out: Path) -> None:
    class Other(ToyAdapter):
        def tower_slot(self, base: Path):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            from kuea_mllm.adapters.base import Tap

            return replace(super().tower_slot(base), tap=Tap((-1,), drops_cls=True))

    (problem,) = verify_model(out, adapter=Other()).problems
    assert "config.json: layers read was [-2] at the swap and is [-1] now" in problem
