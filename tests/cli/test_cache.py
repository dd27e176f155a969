"""`kuea-mllm cache`: build, verify, ls, rm."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from kuea_mllm.cli.cache import app
from kuea_mllm.miniworld import ASSETS


@pytest.fixture
def cache(pictures, tmp_path, monkeypatch):
    monkeypatch.delenv("KUEA_MLLM_DEBUG", raising=False)
    monkeypatch.delenv("KUEA_MLLM_QUIET", raising=False)
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))

    def call(verb, *arguments, answer=None, images=pictures):
        recipe = [
            "--recipe=align/miniworld",
            f"--student={ASSETS / 'clip'}",
            f"--teacher={ASSETS / 'teacher'}",
            f"--images={images}",
            "--device=cpu",
            "--set=optim.batch_size=16",
            "--set=data.workers=0",
            "--set=data.heldout_count=6",
        ]
        options = [*(recipe if verb in {"build", "verify"} else []), *map(str, arguments)]
        return CliRunner().invoke(app, [verb, *options], input=answer)

    return call


def test_build_computes_what_is_missing_and_names_the_stores(cache):
    first = json.loads(cache("build", "--set=data.count=20", "--json").stdout)
    assert (first["images"], first["computed"], first["unreadable"]) == (20, 20, [])
    rest = json.loads(cache("build", "--json").stdout)
    assert (rest["images"], rest["computed"]) == (58, 38)
    assert rest["stores"] == first["stores"]
    assert set(rest["stores"]) == {"teacher_0", "original"}


def test_verify_accepts_what_was_built(cache):
    assert cache("build").exit_code == 0
    result = cache("verify", "--count=10")
    assert result.exit_code == 0, result.stderr
    assert "teacher_0: 10 rows checked" in result.stdout
    assert "0 images changed" in result.stdout


def test_verify_names_an_image_that_changed(cache, pictures, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    assert cache("build", images=folder).exit_code == 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    by_size = sorted(files, key=lambda path: path.stat().st_size)
    # The listing knows names and sizes, so only a change that keeps them gets this far.
    for path in files:
        size = path.stat().st_size
        other = next((p for p in by_size if p != path and p.stat().st_size <= size), None)
        if other is not None:
            data = other.read_bytes()
            path.write_bytes(data + bytes(size - len(data)))
    result = cache("verify", "--count=58", images=folder)
    assert result.exit_code == 1
    assert "images changed since it was built, the first is" in result.stderr
    assert "cache rm" in result.stderr


def test_verify_of_what_was_never_built_says_so(cache):
    result = cache("verify")
    assert result.exit_code == 2
    assert "holds no row yet" in result.stderr


def test_ls_shows_each_cache_and_what_is_wrong_with_it(cache, tmp_path):
    assert "no caches in" in cache("ls").stdout
    cache("build", "--set=data.count=20")
    table = cache("ls").stdout
    assert "31.25 %" in table
    assert "teacher" in table
    damaged = next((tmp_path / "cache").iterdir())
    os.truncate(damaged / "done.npy", 3)
    listed = json.loads(cache("ls", "--json").stdout)["caches"]
    assert sorted(bool(row["problem"]) for row in listed) == [False, True]
    assert "done.npy is truncated" in cache("ls").stdout


def test_rm_asks_first(cache, tmp_path):
    cache("build", "--set=data.count=20")
    name = next((tmp_path / "cache").iterdir()).name.removeprefix("embeddings-")
    assert cache("rm", name, answer="n\n").exit_code == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert f"removed {name}" in cache("rm", name, answer="y\n").stdout
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert cache("rm", "--all", "--yes").exit_code == 0
    assert list((tmp_path / "cache").iterdir()) == []


def test_rm_of_an_unknown_cache_is_refused(cache):
    result = cache("rm", "abc")
    assert result.exit_code == 2
    assert "there is no cache 'abc'" in result.stderr
    assert "name the caches to remove" in cache("rm").stderr


def test_a_random_transform_is_refused_before_anything_is_opened(cache):
    result = cache("build", "--set=data.augment=flip")
    assert result.exit_code == 2
    assert "targets.cache cannot be used with data.augment=flip" in result.stderr
