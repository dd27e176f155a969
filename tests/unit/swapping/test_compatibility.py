"""The report before a swap: verdicts, lineage, drift, what can be forced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_mllm import ADAPTER, SPEC, ToyAdapter, body, hashes, make_tower, write_base

from kuea_mllm.adapters.base import Tap, TowerSlot
from kuea_mllm.adapters.reading import ReadingProblem
from kuea_mllm.errors import TowerMismatch
from kuea_mllm.swapping import inspect_fit, load_any_tower, swap_tower_files
from kuea_mllm.swapping.compatibility import CompatibilityReport
from kuea_mllm.swapping.drift import (
    DRAWN_DRIFT_LIMIT,
    TAP_DRIFT_LIMIT,
    compare_towers,
    default_probe_count,
)
from kuea_mllm.swapping.report import Check
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.fingerprint import fingerprint_all
from kuea_mllm.towers.model.streaming import Reading, read_outputs
from kuea_mllm.towers.model.tower import Tower, build_model


def moved_tower(amount: float, *, seed: int = 0) -> Tower:
    """The base's own tower, every weight moved a little."""
    tower = make_tower(seed)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.add_(torch.randn_like(parameter) * amount)
    return tower


def found(report: CompatibilityReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_report_writes_nothing_and_names_all_comparisons(tmp_path: Path, base: Path) -> None:
    before = hashes(tmp_path)
    report = inspect_fit(base, moved_tower(1e-4), ADAPTER)
    assert hashes(tmp_path) == before
    assert report.verdict == "ok"
    names = [check.name for check in report.checks]
    assert names[:10] == [
        *("family", "width", "number of layers", "number of heads", "MLP width", "patch size"),
        *("image size", "activation", "layer norm epsilon", "image mean"),
    ]
    for name in ("tokens read", "values", "lineage", "drift of the tokens read"):
        assert name in names
    json.dumps(report.to_dict(), allow_nan=False)


def test_all_differences_are_reported_at_once(base: Path) -> None:
    other = make_tower(1, replace(SPEC, width=32, layers=3))
    report = inspect_fit(base, other, ADAPTER)
    assert [check.name for check in report.refusals] == ["width", "number of layers"]
    assert report.lineage is None
    with pytest.raises(TowerMismatch, match=r"width is 32.* Other differences: number of layers"):
        report.require(str(base))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"activation": "gelu"}, "activation"),
        ({"layer_norm_eps": 1e-6}, "layer norm epsilon"),
        ({"mean": (0.5, 0.5, 0.5)}, "image mean"),
    ],
)
def test_force_overrides_and_is_recorded(
    tmp_path: Path, base: Path, change: dict[str, Any], name: str
) -> None:
    tower = moved_tower(1e-4)
    tower.spec = replace(tower.spec, **change)
    with pytest.raises(TowerMismatch, match=rf"(?s)its {name} is .*--force"):
        swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)
    assert not (tmp_path / "out").exists()
    swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER, force=True)
    recorded = json.loads((tmp_path / "out" / "kuea.json").read_text())["compatibility"]
    forced = [check["name"] for check in recorded["checks"] if check["forced"]]
    assert forced == [name]


def test_force_does_not_override_shapes(tmp_path: Path, base: Path) -> None:
    tower = make_tower(1, replace(SPEC, width=32))
    tower.spec = replace(tower.spec, activation="gelu")
    with pytest.raises(TowerMismatch, match="its width is 32"):
        swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER, force=True)
    assert not (tmp_path / "out").exists()


class OddSlot(ToyAdapter):
    """A toy base that reads its tower in another way."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self._changes = changes

    def tower_slot(self, base: Path) -> TowerSlot:
        return replace(super().tower_slot(base), **self._changes)


def test_layer_that_the_tower_lacks_is_refused(base: Path) -> None:
    report = inspect_fit(base, moved_tower(1e-4), OddSlot(tap=Tap((-4,), True)))
    assert found(report, "tokens read").verdict == "refuse"
    assert not found(report, "tokens read").can_force


def test_projector_of_another_width_is_refused(base: Path) -> None:
    report = inspect_fit(base, moved_tower(1e-4), OddSlot(projector_width=32))
    check = found(report, "projector input")
    assert (check.base, check.tower, check.verdict) == ("width 32", "width 16", "refuse")
    assert found(inspect_fit(base, moved_tower(1e-4), OddSlot(projector_width=16)), check.name)


def test_unknown_tap_is_warned_of_and_compared_at_the_penultimate_layer(base: Path) -> None:
    report = inspect_fit(base, moved_tower(1e-4), OddSlot(tap=None))
    assert found(report, "tokens read").verdict == "warn"
    assert report.drift is not None
    assert report.drift.tap.startswith("unknown; compared: hidden state -2")


def test_peft_adapter_in_the_base_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    check = found(inspect_fit(base, moved_tower(1e-4), ADAPTER), "base")
    assert check.verdict == "refuse"
    assert "Merge it" in check.remedy


class Reader(ToyAdapter):
    def reading_problems(self, base: Path) -> list[ReadingProblem]:
        return [ReadingProblem("config.json: layer", "-1", "-2", "Answers get worse.")]


def test_adapter_can_warn_of_settings(base: Path) -> None:
    check = found(inspect_fit(base, moved_tower(1e-4), Reader()), "config.json: layer")
    assert (check.verdict, check.base) == ("warn", "-1 (usual: -2)")


def test_nan_and_overflow_are_refused_by_tensor(tmp_path: Path) -> None:
    half = write_base(tmp_path / "half", dtype=torch.float16)
    name = "vision_model.post_layernorm.bias"
    for value, words in ((float("nan"), "NaN or infinity in"), (1e6, "overflows")):
        tower = moved_tower(1e-4)
        with torch.no_grad():
            tower.model.state_dict()[name][0] = value
        check = found(inspect_fit(half, tower, ADAPTER), "values")
        assert check.verdict == "refuse"
        assert words in check.tower
        assert "post_layernorm.bias" in check.tower
        assert not check.can_force


def test_tower_rounded_on_its_way_is_warned_of(base: Path) -> None:
    tower = moved_tower(1e-3)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.copy_(parameter.half().float())
    assert "float16" in found(inspect_fit(base, tower, ADAPTER), "rounding").tower
    clean = inspect_fit(base, moved_tower(1e-3), ADAPTER)
    assert "rounding" not in [check.name for check in clean.checks]


# Lineage.


def relation(base: Path, tower: Tower) -> tuple[str, str]:
    report = inspect_fit(base, tower, ADAPTER, measure_drift=False)
    assert report.lineage is not None
    return report.lineage.relation, found(report, "lineage").verdict


def test_weights_tell_a_fine_tuned_tower_from_a_stranger(base: Path) -> None:
    assert relation(base, moved_tower(1e-4)) == ("near", "ok")
    assert relation(base, make_tower(1)) == ("unrelated", "warn")
    report = inspect_fit(base, make_tower(1), ADAPTER)
    assert report.lineage is not None
    assert abs(report.lineage.weight_cosine or 1.0) < 0.3
    assert (report.lineage.weight_distance or 0.0) > 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_record_proves_descent_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "half", dtype=dtype)
    tower = moved_tower(1e-3)
    start = fingerprint_all(body(make_tower(0)))
    tower.manifest = {"base_tower": {"reference": "org/clip", "fingerprints": start}}
    assert relation(base, tower) == ("descends", "ok")


def test_base_whose_tower_was_tuned_is_warned_of(tmp_path: Path) -> None:
    merged = moved_tower(1e-3)
    base = write_base(
        tmp_path / "tuned",
        change=lambda eye: eye.update(
            {f"eye.{name}": tensor for name, tensor in body(merged).items()}
        ),
    )
    tower = moved_tower(2e-3)
    tower.manifest = {
        "base_tower": {
            "reference": "org/clip",
            "fingerprints": fingerprint_all(body(make_tower(0))),
        }
    }
    check = found(inspect_fit(base, tower, ADAPTER), "lineage")
    assert check.verdict == "warn"
    assert "org/clip" in check.remedy
    assert "LoRA" in check.remedy


def test_converted_tower_claims_no_start(base: Path) -> None:
    tower = moved_tower(1e-4)
    tower.manifest = {"base_tower": {"reference": "x.pt", "fingerprint": tower.fingerprint}}
    assert relation(base, tower) == ("near", "ok")


def test_original_and_sibling_are_known_from_the_history(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    swap_tower_files(base, moved_tower(1e-3), out, adapter=ADAPTER, measure_drift=False)
    assert relation(out, make_tower(0)) == ("original", "ok")
    sibling = moved_tower(2e-3)
    start = fingerprint_all(body(make_tower(0)))
    sibling.manifest = {"base_tower": {"reference": "org/clip", "fingerprints": start}}
    assert relation(out, sibling) == ("sibling", "ok")


# Drift.


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    "reading",
    [
        Reading((-2,), drops_cls=True),
        Reading((-1,), drops_cls=False, after_norm=True),
        Reading((0, 1, -1), drops_cls=True),
    ],
)
def test_block_by_block_equals_the_whole_model(family: str, reading: Reading) -> None:
    tower = sample(family)
    pixels = probe_pixels(tower.spec, count=2)
    tokens, embedding = read_outputs(tower.spec, tower.canonical_state(), pixels, reading)
    encoder = TowerEncoder(tower)
    with torch.no_grad():
        states = encoder.hidden_states(pixels)
        body_of: Any = getattr(tower.model, "vision_model", tower.model)
        parts = [states[layer] for layer in reading.layers]
        if reading.after_norm:
            parts = [body_of.post_layernorm(part) for part in parts]
        cut = tower.spec.prefix_tokens if reading.drops_cls else 0
        expected = torch.cat([part[:, cut:] for part in parts], dim=-1)
        assert embedding is not None
        torch.testing.assert_close(embedding, encoder(pixels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)


def sample(family: str) -> Tower:
    if family == "clip":
        return make_tower(3)
    from transformers import SiglipVisionConfig, SiglipVisionModel

    spec = replace(
        SPEC, family="siglip", embedding_width=16, activation="gelu", layer_norm_eps=1e-6
    )
    torch.manual_seed(3)
    make: Any = SiglipVisionConfig
    config = make(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    state = SiglipVisionModel(config).state_dict()
    return Tower(build_model(spec, state, where="toy"), spec, "siglip", "hf_directory")


def test_drift_counts_what_the_mllm_reads_only() -> None:
    original, tuned = make_tower(0), make_tower(0)
    with torch.no_grad():
        tuned.model.state_dict()["vision_model.encoder.layers.1.mlp.fc2.bias"].add_(1.0)
    states = original.canonical_state(), tuned.canonical_state()
    read = compare_towers(SPEC, *states, Tap((-2,), drops_cls=True))
    assert read.tap_relative == 0.0
    assert read.embedding is not None
    assert read.embedding["bound_max"] > 0.0
    last = compare_towers(SPEC, *states, Tap((-1,), drops_cls=True))
    assert last.tap_relative > 0.1


def test_drift_of_a_base_without_projection_says_whose_was_used(base: Path) -> None:
    drift = inspect_fit(base, moved_tower(1e-3), ADAPTER).drift
    assert drift is not None
    assert "new tower's projection" in drift.embedding_note
    assert drift.embedding is not None
    assert drift.embedding["cosine_mean"] > 0.99


def test_drift_beyond_the_limit_is_warned_of(base: Path) -> None:
    for amount, verdict in ((1e-4, "ok"), (0.02, "warn")):
        report = inspect_fit(base, moved_tower(amount), ADAPTER)
        assert report.drift is not None
        assert (report.drift.tap_relative > DRAWN_DRIFT_LIMIT) == (verdict == "warn")
        assert found(report, "drift of the tokens read").verdict == verdict


def test_own_images_are_used(tmp_path: Path, base: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (9, 12), colour).save(tmp_path / "photos" / f"{index}.png")
    drift = inspect_fit(base, moved_tower(1e-3), ADAPTER, tmp_path / "photos").drift
    assert drift is not None
    assert (drift.images, drift.limit) == (3, TAP_DRIFT_LIMIT)
    assert "photos" in drift.image_source


def test_large_towers_get_fewer_probe_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kuea_mllm.swapping.drift._MOST_DRAWN", 8)
    assert default_probe_count(SPEC) == 8
    large = replace(SPEC, image_size=336, patch_size=14, width=1024, layers=24, mlp_width=4096)
    assert default_probe_count(large) == 1


def test_stored_tower_is_read_lazily_and_is_the_same(tmp_path: Path) -> None:
    from kuea_mllm.swapping.sources import StoredTower
    from kuea_mllm.towers.writing.save import save_tower

    tower = make_tower(4)
    save_tower(tower, tmp_path / "tower", manifest={"kind": "tower"})
    stored = load_any_tower(tmp_path / "tower")
    assert isinstance(stored, StoredTower)
    assert stored.fingerprint == tower.fingerprint
    assert stored.spec == tower.spec
    assert stored.manifest is not None
    assert stored.manifest["fingerprint"] == tower.fingerprint
    expected = tower.canonical_state()
    assert all(torch.equal(stored.canonical_state()[name], expected[name]) for name in expected)
