"""A multi-teacher distillation is scored through its head for CLIP."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kuea_mllm.alignment.run import run_alignment
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images
from kuea_mllm.probing.projection import is_projection, load_projection
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.reading.load import load_tower


def run(out, images, **objective):
    settings = {
        "student.model": str(ASSETS / "clip"),
        "teacher.model": str(ASSETS / "teacher"),
        "data.images": str(images),
        "data.workers": 0,
        "data.heldout_count": 16,
        "optim.batch_size": 16,
        "optim.steps": 2,
        "optim.warmup_steps": 1,
        "runtime.device": "cpu",
        **{f"objective.{key}": value for key, value in objective.items()},
    }
    recipe = load_recipe("align/miniworld", AlignRecipe, settings=settings)
    run_alignment(recipe, out, progress=False)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    write_images(folder, split="train", count=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def distilled(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return run(out, images, distill_weight=1.0, kernel_weight=0.0, preserve_weight=0.0)


@pytest.fixture
def copy(distilled, tmp_path):
    shutil.copytree(distilled, tmp_path / "copy")
    return tmp_path / "copy"


def test_embeddings_are_the_towers_through_the_first_head(distilled):
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = load_file(distilled / "heads" / "heads.safetensors")
    with torch.no_grad():
        hidden = TowerEncoder(load_tower(distilled / "tower"))(pixels)
        hidden = F.gelu(F.linear(hidden, state["0.0.weight"], state["0.0.bias"]))
        expected = F.linear(hidden, state["0.2.weight"], state["0.2.bias"])
        found = load_projection(distilled / "heads")
        embedded = found.embedder.module(pixels)
    torch.testing.assert_close(embedded, expected)
    assert found.base == str(ASSETS / "clip")
    assert found.embedder.width == expected.shape[1] == 64
    assert {name.split(".")[0] for name in state} == {"0", "1"}


def test_heads_are_told_from_a_tower(distilled):
    assert is_projection(distilled / "heads")
    assert not is_projection(distilled / "tower")
    assert not is_projection(distilled)


def test_a_run_without_distillation_has_no_heads(images, tmp_path):
    assert not (run(tmp_path / "out", images) / "heads").exists()


def test_other_heads_have_another_fingerprint(distilled, copy):
    path = copy / "heads" / "heads.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    one, other = (load_projection(each / "heads").embedder for each in (distilled, copy))
    assert one.fingerprint != other.fingerprint


def test_heads_alone_are_refused(copy):
    shutil.rmtree(copy / "tower")
    with pytest.raises(TowerError, match="has no tower beside it"):
        load_projection(copy / "heads")


def test_heads_beside_another_tower_are_refused(copy):
    shutil.rmtree(copy / "tower")
    shutil.copytree(ASSETS / "clip", copy / "tower")
    with pytest.raises(TowerError, match="are not of one run"):
        load_projection(copy / "heads")


def test_another_clip_than_the_heads_learnt_from_is_refused(copy):
    record = json.loads((copy / "heads" / "kuea.json").read_text())
    record["base_tower"] |= {"fingerprint": "0" * 64, "fingerprints": {}}
    (copy / "heads" / "kuea.json").write_text(json.dumps(record))
    with pytest.raises(TowerMismatch, match="is not the CLIP that"):
        load_projection(copy / "heads")
    assert load_projection(copy / "heads", base=str(ASSETS / "clip")).found_by == "--base"


def test_clip_of_the_heads_that_moved_is_asked_for_by_its_option(copy):
    path = copy / "heads" / "kuea.json"
    record = json.loads(path.read_text())
    record["base_tower"] |= {"reference": "worlds/gone", "path": "/worlds/gone"}
    path.write_text(json.dumps(record))
    with pytest.raises(
        TowerError, match=r"(?s)^key base_tower\.reference of .*Give --base"
    ) as found:
        load_projection(copy / "heads")
    assert str(path) in found.value.problem


def test_damaged_heads_are_named(copy):
    (copy / "heads" / "heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(TowerError, match=r"heads\.safetensors is damaged"):
        load_projection(copy / "heads")
