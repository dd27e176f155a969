"""Swapping back is exact; mixes between both ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_mllm import ADAPTER, ToyAdapter, body, hashes, make_tower, write_base

from kuea_mllm.adapters import registry
from kuea_mllm.adapters.base import AdapterManifest
from kuea_mllm.errors import OutputError, TowerError, TowerMismatch, UserError
from kuea_mllm.io import atomic_directory
from kuea_mllm.swapping import (
    compatibility,
    load_any_tower,
    swap_mixed_files,
    swap_tower_files,
    tower_fingerprint_of,
)


@pytest.fixture(autouse=True)
def toy_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = AdapterManifest("toy", "a toy", "toy_mllm:ToyAdapter")
    monkeypatch.setattr(registry, "_discover", lambda: ({"toy": manifest}, {}))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_itself_gives_its_tower_back(
    tmp_path: Path, dtype: torch.dtype, shards: bool
) -> None:
    base = write_base(tmp_path / "base", dtype=dtype, shards=shards)
    swap_tower_files(base, make_tower(1), tmp_path / "one", adapter=ADAPTER)
    original = load_any_tower(base)
    assert original.layout == "mllm_directory"
    swap_tower_files(tmp_path / "one", original, tmp_path / "two", adapter=ADAPTER)
    before, after = hashes(base), hashes(tmp_path / "two")
    weights = [name for name in before if name.endswith((".safetensors", ".index.json"))]
    assert weights
    assert all(before[name] == after[name] for name in weights)
    record = json.loads((tmp_path / "two" / "kuea.json").read_text())
    assert record["compatibility"]["lineage"]["relation"] == "original"


def test_tower_of_a_swapped_model_keeps_its_record(tmp_path: Path) -> None:
    base, tower = write_base(tmp_path / "base"), make_tower(1)
    tower.manifest = {"kind": "tower", "steps": 7}
    swap_tower_files(base, tower, tmp_path / "one", adapter=ADAPTER)
    taken = load_any_tower(tmp_path / "one")
    assert taken.manifest == {"kind": "tower", "steps": 7}
    assert taken.fingerprint == tower.fingerprint
    assert taken.spec.activation == "quick_gelu"


def test_directory_that_is_neither_is_named(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(TowerError, match="bert"):
        load_any_tower(tmp_path / "bert")


def test_cards_of_the_base_are_kept(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\nthe base")
    swap_tower_files(base, make_tower(1), tmp_path / "one", adapter=ADAPTER)
    swap_tower_files(tmp_path / "one", make_tower(2), tmp_path / "two", adapter=ADAPTER)
    for out in (tmp_path / "one", tmp_path / "two"):
        assert (out / "README.base.md").read_text().endswith("the base")
        card = (out / "README.md").read_text()
        assert "mit" in card
        assert "Compatibility" in card


# Mixes.


def test_mixes_are_complete_models_between_both_ends(tmp_path: Path) -> None:
    base, tower = write_base(tmp_path / "base", shards=True), make_tower(1)
    before = hashes(base)
    receipts = swap_mixed_files(
        base, tower, tmp_path / "out", weights=[0, 0.25, 1], adapter=ADAPTER
    )
    assert hashes(base) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "0.25", "1"]
    plain = tmp_path / "plain"
    swap_tower_files(base, tower, plain, adapter=ADAPTER)
    weights = {
        name: load_file(tmp_path / "out" / name / "model-1.safetensors")
        for name in ("0", "0.25", "1")
    }
    one, other = (load_file(folder / "model-1.safetensors") for folder in (base, plain))
    for name in one:
        assert torch.equal(weights["0"][name], one[name])
        assert torch.equal(weights["1"][name], other[name])
        if not one[name].is_floating_point():
            continue
        torch.testing.assert_close(
            weights["0.25"][name], 0.25 * other[name] + 0.75 * one[name], rtol=1e-5, atol=1e-6
        )
    shared = [tmp_path / "out" / name / "model-2.safetensors" for name in weights]
    assert all(path.samefile(base / "model-2.safetensors") for path in shared)
    drifts = [receipts[weight].compatibility for weight in (0.25, 1)]
    moved = [report.drift.tap_relative for report in drifts if report and report.drift]
    assert moved[0] < moved[1]
    record = json.loads((tmp_path / "out" / "0.25" / "kuea.json").read_text())
    assert record["tower"]["mix"]["weight"] == 0.25
    assert record["tower"]["fingerprint"] == tower.fingerprint


def test_mix_with_a_stranger_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_base(tmp_path / "base")
    swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER, weight=0.1)
    assert "no tower at all" in caplog.text


def test_mix_with_the_tower_that_the_base_holds_is_refused(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(TowerMismatch, match="tower-0 is the tower that it holds already"):
        swap_tower_files(base, make_tower(0), out, adapter=ADAPTER, weight=0.3)
    with pytest.raises(TowerMismatch, match="nothing to mix"):
        swap_mixed_files(base, make_tower(0), out, weights=[0, 0.3], adapter=ADAPTER)
    assert not out.exists()


def test_mix_of_weight_zero_is_the_base_again(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    swap_tower_files(base, make_tower(1), out, adapter=ADAPTER, weight=0.0)
    assert hashes(out)["model.safetensors"] == hashes(base)["model.safetensors"]


def test_the_tower_itself_is_compared_once_for_all_mixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = compatibility.scan_weights
    monkeypatch.setattr(
        compatibility, "scan_weights", lambda *sides: calls.append(1) or real(*sides)
    )
    base = write_base(tmp_path / "base")
    compatibility.examine(
        base, make_tower(1), ADAPTER, weights=[0.1, 0.2, 0.3], measure_drift=False
    )
    assert len(calls) == 4


def test_weights_that_make_no_sense_write_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for weights in ([0.5, 2.0], [0.5, 0.5], []):
        with pytest.raises(UserError):
            swap_mixed_files(
                base, make_tower(1), tmp_path / "out", weights=weights, adapter=ADAPTER
            )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Robustness of the place.


def test_base_made_of_links_is_not_touched(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in base.iterdir():
        if path.is_file():
            os.link(path, linked / path.name)
    before = hashes(base)
    swap_tower_files(linked, make_tower(1), tmp_path / "out", adapter=ADAPTER)
    assert hashes(base) == before


def test_copies_share_nothing_with_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=True)
    receipt = swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER, link=False)
    assert receipt.files_linked == ()
    assert not (tmp_path / "out" / "model-2.safetensors").samefile(base / "model-2.safetensors")


def test_second_swap_into_the_same_place_loses(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"

    class Slow(ToyAdapter):
        """Another swap finishes after this one has made sure that the place is free."""

        def check_base(self, base: Path) -> None:
            if not out.exists():
                swap_tower_files(base, make_tower(2), out, adapter=ADAPTER)

    with pytest.raises(OutputError, match="exists already"):
        swap_tower_files(base, make_tower(1), out, adapter=Slow())
    assert tower_fingerprint_of(out, ADAPTER) == make_tower(2).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_place_taken_at_the_last_moment_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="created by another process meanwhile"),
        atomic_directory(out) as partial,
    ):
        (partial / "mine").touch()
        out.mkdir()
        (out / "theirs").touch()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_process_are_removed_but_not_those_of_a_live_one(
    tmp_path: Path,
) -> None:
    dead = tmp_path / ".out.partial-dead"
    dead.mkdir()
    (dead / "half").touch()
    os.utime(dead, (1, 1))
    with atomic_directory(tmp_path / "out") as live:
        assert not dead.exists()
        os.utime(live, (1, 1))
        with atomic_directory(tmp_path / "out2"):
            pass
        with pytest.raises(OutputError), atomic_directory(tmp_path / "out"):
            assert live.exists()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
        (live / "kept").touch()
    assert (tmp_path / "out" / "kept").exists()


def test_target_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER)


def test_pooling_head_that_the_tower_lacks_stays(tmp_path: Path) -> None:
    from kuea_mllm.swapping.fit import FittedState

    own = body(make_tower(0))
    targets = own | {"head.probe": torch.ones(1)}
    fitted = FittedState(body(make_tower(1)), targets, "base")
    assert set(fitted) == set(own)
    with pytest.raises(TowerMismatch, match=r"has 1 tower tensors, first extra\.bias"):
        FittedState(own, own | {"extra.bias": torch.ones(1)}, "base")
