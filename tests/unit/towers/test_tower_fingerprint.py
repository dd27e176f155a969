"""Fingerprints: equal for equal weights in any layout and dtype, different for different ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tower_samples import CLIP, SIGLIP, canonical, make_tower

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.model.fingerprint import fingerprint_all, fingerprint_state

relaxed = settings(deadline=None, max_examples=10)


@relaxed
@given(st.integers(0, 2**31))
def test_layout_does_not_matter(seed: int) -> None:
    state = canonical(CLIP, seed=seed)
    expected = fingerprint_state(state)
    prefixed = convert.canonical_to_hf(state)
    assert fingerprint_state(prefixed) == expected
    assert fingerprint_state(dict(reversed(prefixed.items()))) == expected
    assert fingerprint_state(convert.canonical_to_visual(state)) == expected
    siglip = canonical(SIGLIP, seed=seed)
    assert fingerprint_state(convert.canonical_to_trunk(siglip)) == fingerprint_state(siglip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_storage_does_not_matter(dtype: torch.dtype) -> None:
    state = canonical(CLIP)
    stored = {name: t.to(dtype) for name, t in state.items()}
    widened = {name: t.float() for name, t in stored.items()}
    assert fingerprint_state(stored) == fingerprint_state(widened)
    # How a float32 tower is recognised in the half-precision copy inside an MLLM.
    assert fingerprint_state(stored) == fingerprint_state(state, rounded_to=dtype)
    assert fingerprint_state(stored) != fingerprint_state(state)
    doubled = {name: t.double() for name, t in state.items()}
    assert fingerprint_state(doubled) == fingerprint_state(state)


def test_all_roundings_are_given() -> None:
    state = canonical(CLIP)
    found = fingerprint_all(state)
    assert list(found) == ["float32", "float16", "bfloat16"]
    assert found["float32"] == fingerprint_state(state)
    assert found["bfloat16"] == fingerprint_state(state, rounded_to=torch.bfloat16)
    assert len(set(found.values())) == 3


def test_only_the_vision_body_counts() -> None:
    state = canonical(CLIP)
    expected = fingerprint_state(state)
    more = state | {
        "visual_projection.weight": torch.ones(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.encoder.layers.0.mlp.fc1.bias": torch.ones(3),
        "logit_scale": torch.ones(()),
    }
    assert fingerprint_state(more) == expected
    del more["visual_projection.weight"]
    assert fingerprint_state(more) == expected


@relaxed
@given(st.data())
def test_every_body_weight_counts(data: st.DataObject) -> None:
    state = canonical(CLIP)
    expected = fingerprint_state(state)
    name = data.draw(st.sampled_from(sorted(set(state) - {"visual_projection.weight"})))
    changed = state[name].clone()
    changed.flatten()[data.draw(st.integers(0, changed.numel() - 1))] += 1e-3
    assert fingerprint_state(state | {name: changed}) != expected


def test_tower_without_body_is_refused() -> None:
    with pytest.raises(TowerError, match="no vision tower"):
        fingerprint_state({"language_model.layers.0.weight": torch.ones(1)})


def test_tower_fingerprint_follows_its_weights() -> None:
    tower = make_tower(CLIP)
    before = tower.fingerprint
    with torch.no_grad():
        next(tower.model.parameters()).add_(1)
    assert tower.fingerprint != before
