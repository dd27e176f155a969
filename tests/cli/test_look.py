"""`kuea-mllm look`: what changed inside a tower."""

import json
import re

import numpy as np
import pytest
import torch

from kuea_mllm.miniworld import ASSETS
from kuea_mllm.towers.model.resize import resize_tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower

CLIP, TEACHER = ASSETS / "clip", ASSETS / "teacher"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A tower a little beside the original."""
    tower = load_tower(CLIP)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tower.model.named_parameters():
            if name.endswith("weight") and weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(0.1 * weight.std() * noise)
    out = tmp_path_factory.mktemp("towers") / "moved"
    save_tower(tower, out, manifest={})
    return out


def look(kuea, tower, pictures, out, *more):
    return kuea(
        "look", tower, "--against", CLIP, "--images", pictures, "--out", out, "--device=cpu",
        "--workers=0", "--pairs=3", *more,
    )  # fmt: skip


def test_a_look_writes_report_figures_and_numbers(kuea, moved, pictures, tmp_path):
    out = tmp_path / "out"
    answer = look(kuea, moved, pictures, out, "--teacher", TEACHER, "--json")
    assert answer.code == 0, answer.err
    record = json.loads((out / "look.json").read_text())
    assert json.loads(answer.out) == record
    assert record["images"]["count"] == 64
    assert 0.5 < record["embeddings"]["drift"]["cosine_mean"] < 1.0
    assert set(record["pairs"]["neighbours"]) == {
        "original|aligned",
        "original|teacher",
        "aligned|teacher",
    }
    assert len(record["layers"]["names"]) == 12
    assert np.asarray(record["layers"]["cka"]).shape == (12, 12)
    matrices = json.loads((out / "kernel_matrices.json").read_text())
    assert np.diagonal(matrices["teacher"]).tolist() == [1.0] * 64
    names = {path.stem for path in (out / "figures").iterdir()}
    assert names == {
        "attention",
        "kernel_differences",
        "kernel_matrices",
        "layers",
        "pairs_apart",
        "pairs_blind",
        "pairs_together",
    }
    page = (out / "report.html").read_text()
    for heading in ("Where it looks", "Pairs that moved apart", "Kernel matrices", "Layers"):
        assert heading in page
    assert record["pairs"]["moved"]["apart"][0]["first"] in page
    row_of = {tuple(name): row for row, name in enumerate(record["layers"]["names"])}
    # A row of the table: a layer before and after, and each with the teacher's last layer.
    likeness = [
        record["layers"]["cka"][row_of[first, 2]][row_of[second, layer]]
        for first, second, layer in (
            ("original", "aligned", 2),
            ("original", "teacher", 3),
            ("aligned", "teacher", 3),
        )
    ]
    words = re.sub(r"<[^>]*>", " ", page).split()
    shown = ["2", *(f"{value:.3f}" for value in likeness)]
    assert any(words[start : start + 4] == shown for start in range(len(words)))


def test_a_tower_against_itself_changed_nothing(kuea, pictures, tmp_path):
    out = tmp_path / "out"
    answer = look(kuea, CLIP, pictures, out, "--layer-images=0", "--limit=32")
    assert answer.code == 0, answer.err
    assert "hold the same weights" in answer.err
    record = json.loads((out / "look.json").read_text())
    assert record["images"]["count"] == 32
    assert record["embeddings"]["drift"]["distance_max"] == 0.0
    assert record["attention"]["numbers"]["cosine_mean"] == pytest.approx(1.0)
    assert record["pairs"]["moved"] == {"apart": [], "together": []}
    assert record["layers"] is None


def test_kernels_of_a_run_need_a_run(kuea, moved, pictures, tmp_path):
    answer = look(kuea, moved, pictures, tmp_path / "out", "--kernel=recorded")
    assert answer.code == 2
    assert "records no kernels" in answer.err
    assert not (tmp_path / "out").exists()


def test_kernels_of_a_run_are_drawn(kuea, align_arguments, pictures, tmp_path):
    assert kuea(*align_arguments).code == 0
    tower, out = tmp_path / "out" / "tower", tmp_path / "look"
    answer = look(kuea, tower, pictures, out, "--kernel=recorded", "--teacher", TEACHER)
    assert answer.code == 0, answer.err
    record = json.loads((out / "look.json").read_text())
    assert record["kernels"]["student"].startswith("polynomial: degree 3")


def test_other_patches_are_refused_in_one_line(kuea, pictures, tmp_path):
    larger = tmp_path / "larger"
    save_tower(resize_tower(load_tower(CLIP), 48), larger, manifest={})
    answer = look(kuea, larger, pictures, tmp_path / "out")
    assert answer.code == 2
    assert "cannot be compared patch by patch" in answer.err
    assert "Traceback" not in answer.err


def test_a_folder_without_images_is_refused(kuea, moved, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = look(kuea, moved, tmp_path / "empty", tmp_path / "out")
    assert answer.code == 2
    assert "holds no image" in answer.err


def test_an_output_that_exists_is_refused_before_anything_is_loaded(kuea, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    answer = look(kuea, "no/such/tower", pictures, tmp_path / "out")
    assert answer.code == 2
    assert "no/such/tower" not in answer.err
