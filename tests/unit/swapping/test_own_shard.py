"""The tower in a weight file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_mllm import ADAPTER, body, hashes, make_tower, write_base

from kuea_mllm.swapping import swap_mixed_files, swap_tower_files


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return all tensors as a loader would find them, by the index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in set(index.values())}
    assert sorted(index) == sorted(name for file in files.values() for name in file)
    return {name: files[file][name] for name, file in index.items()}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_the_tower_differs(tmp_path: Path, shards: bool, dtype: torch.dtype) -> None:
    base, tower = write_base(tmp_path / "base", shards=shards, dtype=dtype), make_tower(1)
    before = hashes(base)
    swap_tower_files(base, tower, tmp_path / "whole", adapter=ADAPTER)
    receipt = swap_tower_files(base, tower, tmp_path / "own", adapter=ADAPTER, own_shard=True)
    expected: dict[str, Tensor] = {}
    for file in (tmp_path / "whole").glob("*.safetensors"):
        expected |= load_file(file)
    found = tensors_of(tmp_path / "own")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in expected
    )
    assert hashes(base) == before
    assert not (tmp_path / "own" / "model.safetensors").exists()
    assert (tmp_path / "own" / "notes" / "card.md").read_text() == "about"
    own = load_file(tmp_path / "own" / receipt.files_rewritten[-1])
    assert sorted(own) == sorted(f"eye.{name}" for name in body(tower))


def test_later_swaps_write_only_that_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    first = swap_tower_files(base, make_tower(1), tmp_path / "1", adapter=ADAPTER, own_shard=True)
    own = max(first.files_rewritten)
    second = swap_tower_files(
        tmp_path / "1", make_tower(2), tmp_path / "2", adapter=ADAPTER, own_shard=True
    )
    assert second.files_rewritten == (own,)
    for name in second.files_linked:
        assert (tmp_path / "1" / name).samefile(tmp_path / "2" / name)
    assert second.files_linked
    found = tensors_of(tmp_path / "2")
    wanted = body(make_tower(2))
    assert all(torch.equal(found[f"eye.{name}"], tensor) for name, tensor in wanted.items())


def test_linked_files_of_the_first_are_those_of_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=True)
    receipt = swap_tower_files(base, make_tower(1), tmp_path / "1", adapter=ADAPTER, own_shard=True)
    (name,) = receipt.files_linked
    assert (base / "model-2.safetensors").samefile(tmp_path / "1" / name)


def test_mixes_share_all_but_the_tower(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    receipts = swap_mixed_files(
        base,
        make_tower(1),
        tmp_path / "mixes",
        weights=[0.25, 0.75],
        adapter=ADAPTER,
        own_shard=True,
    )
    first, second = (tmp_path / "mixes" / name for name in ("0.25", "0.75"))
    (name,) = receipts[0.75].files_linked
    assert (first / name).samefile(second / name)
    name = "eye.embeddings.class_embedding"
    one, other = (tensors_of(path)[name] for path in (first, second))
    target = body(make_tower(1))["embeddings.class_embedding"]
    original = body(make_tower(0))["embeddings.class_embedding"]
    assert torch.allclose(one, 0.25 * target + 0.75 * original)
    assert torch.allclose(other, 0.75 * target + 0.25 * original)
