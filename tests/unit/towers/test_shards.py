from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.towers.files.shards import (
    PlannedTensor,
    as_planned,
    loaded_shards,
    open_shard,
    write_safetensors,
)

STATE = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(3.0, dtype=torch.float16),
    "empty": torch.zeros(0, 4, dtype=torch.float64),
}


def equal(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in STATE.items()
    )


def test_written_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: as_planned(tensor) for name, tensor in STATE.items()})
    assert equal(load_file(path))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "x.safetensors", {"t": as_planned(matrix.T)})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], matrix.T)


def test_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Tensor:
        made.append(path.stat().st_size if path.exists() else 0)
        return torch.ones(100_000)

    path = tmp_path / "x.safetensors"
    plan = {name: PlannedTensor(torch.float32, (100_000,), make) for name in "abc"}
    write_safetensors(path, plan)
    assert len(made) == 3
    # Each of the earlier ones is on disk before the next is made.
    assert made[2] >= 400_000


def test_tensor_that_differs_from_its_plan_is_an_error(tmp_path: Path) -> None:
    plan = {"t": PlannedTensor(torch.float32, (2,), lambda: torch.ones(3))}
    with pytest.raises(ValueError, match="not as planned"):
        write_safetensors(tmp_path / "x.safetensors", plan)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor q is torch\.int8, which is quantised"):
        write_safetensors(
            tmp_path / "x.safetensors", {"q": as_planned(torch.ones(2, dtype=torch.int8))}
        )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_both_formats_are_read(name: str, tmp_path: Path) -> None:
    if name.endswith(".bin"):
        torch.save(STATE, tmp_path / name)
    else:
        save_file(STATE, tmp_path / name)
    assert loaded_shards(tmp_path) == [name]
    shard = open_shard(tmp_path / name)
    assert equal(dict(shard))
    with pytest.raises(KeyError):
        shard["nothing"]


def test_files_are_chosen_as_transformers_does(tmp_path: Path) -> None:
    def index(name: str, shard: str) -> None:
        (tmp_path / shard).touch()
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(UserError, match="holds no weights"):
        loaded_shards(tmp_path)
    index("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin")
    assert loaded_shards(tmp_path) == ["pytorch_model-00001-of-00001.bin"]
    (tmp_path / "pytorch_model.bin").touch()
    assert loaded_shards(tmp_path) == ["pytorch_model.bin"]
    index("model.safetensors.index.json", "model-00001-of-00001.safetensors")
    assert loaded_shards(tmp_path) == ["model-00001-of-00001.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert loaded_shards(tmp_path) == ["model.safetensors"]


def test_pickles_with_more_than_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "step": 3}, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: step is a int, not a tensor"):
        open_shard(path)


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        open_shard(path)
