"""Swapping on files, with a toy adapter: what is written, what is left alone, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_mllm import ADAPTER, SPEC, ToyAdapter, body, hashes, make_tower, write_base

from kuea_mllm.errors import EnvironmentFailure, OutputError, TowerMismatch, UserError
from kuea_mllm.swapping import swap_tower_files, tower_fingerprint_of
from kuea_mllm.towers.files import model_copy


@pytest.mark.parametrize("prefix", ["eye.", "eye.deep."])
def test_single_file_is_rewritten_and_the_rest_copied(tmp_path: Path, prefix: str) -> None:
    base, tower = write_base(tmp_path / "base", prefix=prefix), make_tower(1)
    before = hashes(base)
    receipt = swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)
    assert hashes(base) == before
    assert receipt.files_rewritten == ("model.safetensors",)
    assert receipt.files_linked == ()
    assert set(receipt.files_copied) == {"config.json", "tokenizer.json", "notes/card.md"}
    assert receipt.tensors_replaced == len(body(tower))
    assert receipt.key_prefix == prefix
    assert receipt.fingerprint_before == make_tower(0).fingerprint
    assert receipt.fingerprint_after == tower.fingerprint
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in body(tower).items():
        assert torch.equal(written[prefix + name], tensor)
    assert torch.equal(written["mouth.2"], torch.full((4, 3), 2.0))
    assert not (tmp_path / "out" / ".cache").exists()


def test_only_shards_of_the_tower_are_rewritten(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", shards=True), tmp_path / "out"
    receipt = swap_tower_files(base, make_tower(1), out, adapter=ADAPTER)
    assert receipt.files_rewritten == ("model-1.safetensors",)
    assert receipt.files_linked == ("model-2.safetensors",)
    assert (out / "model-2.safetensors").samefile(base / "model-2.safetensors")
    # Small files are never links: editing the copy must not reach the base.
    assert not (out / "config.json").samefile(base / "config.json")
    assert (out / "model.safetensors.index.json").is_file()


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    base, out = write_base(tmp_path / "base", shards=True), tmp_path / "out"
    receipt = swap_tower_files(base, make_tower(1), out, adapter=ADAPTER)
    assert receipt.files_linked == ()
    assert "model-2.safetensors" in receipt.files_copied
    assert hashes(out)["model-2.safetensors"] == hashes(base)["model-2.safetensors"]


def test_symbolic_links_of_the_hub_cache_are_resolved(tmp_path: Path) -> None:
    blobs = write_base(tmp_path / "blobs", shards=True)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    before = hashes(blobs)
    out = tmp_path / "out"
    swap_tower_files(snapshot, make_tower(1), out, adapter=ADAPTER)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / "model-2.safetensors").samefile(blobs / "model-2.safetensors")
    assert hashes(blobs) == before


def test_manifest_tells_the_whole_story(tmp_path: Path) -> None:
    base, first = write_base(tmp_path / "base"), make_tower(1)
    first.manifest = {"kind": "tower", "steps": 7}
    one, two = tmp_path / "one", tmp_path / "two"
    swap_tower_files(
        base, first, one, adapter=ADAPTER, command="kuea-mllm swap", reference="org/base"
    )
    record = json.loads((one / "kuea.json").read_text())
    assert (record["schema_version"], record["kind"], record["adapter"]) == (1, "mllm", "toy")
    assert record["base"] == {"reference": "org/base", "path": str(base.resolve())}
    assert record["tower"]["source"] == "tower-1"
    assert record["tower"]["manifest"] == {"kind": "tower", "steps": 7}
    assert record["tower"]["fingerprints"]["float32"] == first.fingerprint
    assert record["replaced"]["fingerprint_before"] == make_tower(0).fingerprint
    assert record["replaced"]["files"] == ["model.safetensors"]
    assert record["slot"]["tap"] == {"layers": [-2], "drops_cls": True, "after_norm": False}
    assert record["command"] == "kuea-mllm swap"
    assert {"torch", "transformers"} <= record["versions"].keys()
    width = next(c for c in record["compatibility"]["checks"] if c["name"] == "width")
    assert (width["base"], width["tower"], width["verdict"]) == ("16", "16", "ok")
    assert record["history"] == []

    swap_tower_files(one, make_tower(2), two, adapter=ADAPTER)
    history = json.loads((two / "kuea.json").read_text())["history"]
    assert [entry["tower"]["source"] for entry in history] == ["tower-1"]


def test_swapping_back_gives_the_same_bytes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    swap_tower_files(base, make_tower(1), tmp_path / "one", adapter=ADAPTER)
    swap_tower_files(tmp_path / "one", make_tower(0), tmp_path / "two", adapter=ADAPTER)
    assert hashes(tmp_path / "two")["model.safetensors"] == hashes(base)["model.safetensors"]
    assert tower_fingerprint_of(tmp_path / "two", ADAPTER) == make_tower(0).fingerprint


def test_same_tower_is_refused_unless_allowed(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(TowerMismatch, match=r"tower-0 is the one that .* holds already"):
        swap_tower_files(base, make_tower(0), out, adapter=ADAPTER)
    assert not out.exists()
    receipt = swap_tower_files(base, make_tower(0), out, adapter=ADAPTER, allow_same=True)
    assert receipt.fingerprint_before == receipt.fingerprint_after


def test_weights_that_no_loader_reads_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    stale = {"pytorch_model.bin", "model.safetensors.index.json", "model.fp16.safetensors"}
    for name in stale:
        (base / name).write_text("{}")
    receipt = swap_tower_files(base, make_tower(1), out, adapter=ADAPTER)
    assert set(receipt.files_left_out) == stale
    assert not any((out / name).exists() for name in stale)


BREAKS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    r"below eye\.: post_layernorm\.bias is missing": lambda eye: eye.pop("eye.post_layernorm.bias"),
    r"below eye\.: extra\.weight is no part of such a tower": lambda eye: eye.update(
        {"eye.extra.weight": torch.ones(1)}
    ),
    r"below eye\.: pre_layrnorm\.bias has shape \(3,\), expected \(16,\)": lambda eye: eye.update(
        {"eye.pre_layrnorm.bias": torch.ones(3)}
    ),
    r"pre_layrnorm\.bias of .* is stored as I8, which is quantised": lambda eye: eye.update(
        {"eye.pre_layrnorm.bias": torch.ones(16, dtype=torch.int8)}
    ),
    "no vision tower was found": lambda eye: eye.clear(),
}


@pytest.mark.parametrize("words", BREAKS)
def test_base_with_other_tensors_is_refused(tmp_path: Path, words: str) -> None:
    base = write_base(tmp_path / "base", change=BREAKS[words])
    with pytest.raises(TowerMismatch, match=words):
        swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    base, tower = write_base(tmp_path / "base", dtype=torch.float16), make_tower(1)
    with torch.no_grad():
        tower.model.state_dict()["vision_model.post_layernorm.bias"][0] = 1e6
    with pytest.raises(TowerMismatch, match=r"float16.*|post_layernorm\.bias overflows"):
        swap_tower_files(base, tower, tmp_path / "out", adapter=ADAPTER)


def test_other_family_and_normalisation_are_refused(tmp_path: Path) -> None:
    base, tower = write_base(tmp_path / "base"), make_tower(1)
    grey = ToyAdapter(mean=(0.5, 0.5, 0.5))
    with pytest.raises(TowerMismatch, match="image mean"):
        swap_tower_files(base, tower, tmp_path / "out", adapter=grey)
    swap_tower_files(base, tower, tmp_path / "out", adapter=ToyAdapter(mean=None))
    tower.spec = replace(SPEC, family="siglip")
    with pytest.raises(TowerMismatch, match="family is siglip, the base asks for clip"):
        swap_tower_files(base, tower, tmp_path / "other", adapter=ADAPTER)


@pytest.mark.parametrize("place", ["existing", "base/inside"])
def test_output_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "existing").mkdir()
    with pytest.raises(OutputError):
        swap_tower_files(base, make_tower(1), tmp_path / place, adapter=ADAPTER)


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"x" * 64])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file or is cut"):
        swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER)


def test_file_cut_short_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short"):
        swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER)


FAILURES: list[tuple[BaseException, type[BaseException]]] = [
    (OSError(errno.ENOSPC, "No space left on device"), EnvironmentFailure),
    (KeyboardInterrupt(), KeyboardInterrupt),
]


@pytest.mark.parametrize(("failure", "expected"), FAILURES)
@pytest.mark.parametrize("at", ["copy", "rewrite", "manifest"])
def test_failure_in_the_middle_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    failure: BaseException,
    expected: type[BaseException],
) -> None:
    base = write_base(tmp_path / "base", shards=True)
    before = hashes(base)

    def fail(*_: object) -> None:
        raise failure

    if at == "copy":
        monkeypatch.setattr(shutil, "copyfile", fail)
    elif at == "rewrite":
        monkeypatch.setattr(model_copy, "rewrite_shard", fail)
    else:
        monkeypatch.setattr("kuea_mllm.swapping.swap.write_json", fail)
    with pytest.raises(expected):
        swap_tower_files(base, make_tower(1), tmp_path / "new" / "out", adapter=ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert hashes(base) == before


def test_bytes_that_do_not_read_back_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(
        model_copy, "rewrite_shard", lambda source, target, *_: shutil.copyfile(source, target)
    )
    with pytest.raises(EnvironmentFailure, match="does not read back"):
        swap_tower_files(base, make_tower(1), tmp_path / "out", adapter=ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
