"""The projection baseline as something that can be probed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kuea_mllm.alignment.projection_run import run_projection
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images
from kuea_mllm.probing import partner
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.probing.projection import is_projection, load_projection
from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.workflows.probe_subject import ProjectionSubject


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    write_images(folder, split="train", count=96, seed=0)
    return folder


@pytest.fixture(scope="module")
def fitted(images, tmp_path_factory):
    settings = {
        "method": "projection",
        "student.model": str(ASSETS / "clip"),
        "teacher.model": str(ASSETS / "teacher"),
        "data.images": str(images),
        "data.workers": 0,
        "optim.batch_size": 16,
        "data.heldout_count": 16,
        "runtime.device": "cpu",
    }
    recipe = load_recipe("align/miniworld", AlignRecipe, settings=settings)
    out = tmp_path_factory.mktemp("run") / "out"
    run_projection(recipe, out, progress=False)
    return out


@pytest.fixture
def copy(fitted, tmp_path):
    shutil.copytree(fitted / "projection", tmp_path / "copy")
    return tmp_path / "copy"


def test_embeddings_are_those_of_the_teacher_times_the_map(fitted, images, tmp_path):
    found = load_projection(fitted)
    how = Extraction(workers=0, cache=tmp_path)
    source = FolderImages(images)
    rows = torch.tensor(extract(source, found.embedder, how).embeddings)
    pixels = torch.stack([ImageTransform(32)(source.read(i)) for i in range(len(source))])
    weight = load_file(fitted / "projection" / "projection.safetensors")["weight"]
    expected = load_teacher(ASSETS / "teacher")(pixels) @ weight.T
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    assert rows.shape == (96, 64)


def test_the_clip_that_it_maps_into_is_named(fitted):
    found = load_projection(fitted / "projection")
    assert found.base == str(ASSETS / "clip")
    assert found.embedder.width == 64


def test_text_tower_is_that_of_the_recorded_revision(fitted, monkeypatch):
    asked = {}

    def load(base, *, revision=None, activation=None):
        asked.update(base=base, revision=revision, activation=activation)
        return load_text_tower(ASSETS / "clip")

    load_text_tower = partner.load_text_tower
    monkeypatch.setattr(partner, "load_text_tower", load)
    found = replace(load_projection(fitted), base="someone/clip", revision="abc")
    assert ProjectionSubject("here", found, "cpu").partner.found_by == "kuea.json"
    assert asked == {"base": "someone/clip", "revision": "abc", "activation": found.activation}
    assert found.activation == load_tower(ASSETS / "clip").spec.activation
    given = load_projection(fitted, base=str(ASSETS / "clip"))
    assert ProjectionSubject("here", given, "cpu").partner.found_by == "--base"


def test_only_a_projection_is_taken_for_one(fitted):
    assert is_projection(fitted)
    assert is_projection(fitted / "projection")
    assert not is_projection(ASSETS / "clip")


def test_other_weights_have_another_fingerprint(fitted, copy):
    state = load_file(copy / "projection.safetensors")
    save_file({"weight": state["weight"] * 2}, copy / "projection.safetensors")
    one, other = (load_projection(each).embedder.fingerprint for each in (fitted, copy))
    assert one != other


def test_another_clip_is_refused(copy):
    record = json.loads((copy / "kuea.json").read_text())
    record["base_tower"]["fingerprint"] = "0" * 64
    (copy / "kuea.json").write_text(json.dumps(record))
    with pytest.raises(TowerMismatch, match=r"is not the CLIP that .* was fitted for"):
        load_projection(copy)


def test_another_teacher_is_refused(copy):
    record = json.loads((copy / "kuea.json").read_text())
    record["teacher"]["fingerprint"] = "0" * 64
    (copy / "kuea.json").write_text(json.dumps(record))
    with pytest.raises(TowerMismatch, match=r"teacher .* is not the one"):
        load_projection(copy)


def change_record(folder, key, **changes):
    record = json.loads((folder / "kuea.json").read_text())
    record[key] |= changes
    (folder / "kuea.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("key", "option"), [("teacher", "--teacher"), ("base_tower", "--base")])
def test_model_that_moved_is_asked_for_by_its_option(copy, key, option):
    change_record(copy, key, reference="worlds/seed0/gone", path="/worlds/seed0/gone")
    with pytest.raises(TowerError) as found:
        load_projection(copy)
    start = f"key {key}.reference of {copy / 'kuea.json'} names a model that cannot be opened"
    assert found.value.problem == f"{start}: there is no file or directory /worlds/seed0/gone."
    assert f"Give {option}" in str(found.value)
    moved = {
        "teacher": {"teacher": str(ASSETS / "teacher")},
        "base_tower": {"base": str(ASSETS / "clip")},
    }
    assert load_projection(copy, **moved[key]).embedder.width == 64


def test_model_that_is_given_and_missing_is_not_blamed_on_the_record(copy):
    for option in ("teacher", "base"):
        with pytest.raises(TowerError, match=r"^there is no file or directory nothing/is/here"):
            load_projection(copy, **{option: "nothing/is/here"})


def test_relative_paths_are_found_from_another_folder(images, tmp_path, monkeypatch):
    world = tmp_path / "world"
    for name in ("clip", "teacher"):
        shutil.copytree(ASSETS / name, world / name)
    monkeypatch.chdir(tmp_path)
    settings = {
        "method": "projection",
        "student.model": "world/clip",
        "teacher.model": "world/teacher",
        "data.images": str(images),
        "data.workers": 0,
        "optim.batch_size": 16,
        "data.heldout_count": 16,
        "runtime.device": "cpu",
    }
    recipe = load_recipe("align/miniworld", AlignRecipe, settings=settings)
    run_projection(recipe, tmp_path / "out", progress=False)
    monkeypatch.chdir("/")
    assert load_projection(tmp_path / "out").base == str(world / "clip")
    record = json.loads((tmp_path / "out" / "projection" / "kuea.json").read_text())
    # As it was typed, beside the path: reports and cards show it.
    assert record["teacher"]["reference"] == "world/teacher"
    assert record["teacher"]["path"] == str(world / "teacher")


def test_a_damaged_file_is_named(copy):
    (copy / "projection.safetensors").write_bytes(b"nothing")
    with pytest.raises(TowerError, match=r"projection\.safetensors is damaged"):
        load_projection(copy)


def test_a_map_that_is_not_finite_is_refused(copy):
    state = load_file(copy / "projection.safetensors")
    save_file({"weight": state["weight"] * float("nan")}, copy / "projection.safetensors")
    with pytest.raises(TowerError, match="weight holds NaN"):
        load_projection(copy)


def test_a_tower_is_no_projection():
    with pytest.raises(TowerError, match=r"holds no projection\.safetensors"):
        load_projection(ASSETS / "clip")
