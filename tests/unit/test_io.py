"""Directories that are complete or absent."""

import errno
import json
import os

import pytest

from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError
from kuea_mllm.io import (
    atomic_directory,
    disk_errors_named,
    follow_umask,
    read_json,
    require_free_output,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_directory_appears_only_when_the_block_is_done(tmp_path):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_way_out_removes_everything_that_was_created(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "new" / "deep" / "out") as partial:
        (partial / "file").write_text("content")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize(("umask", "modes"), [(0o022, (0o755, 0o644)), (0o077, (0o700, 0o600))])
def test_permissions_are_those_that_the_umask_leaves(tmp_path, umask, modes):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "file").touch(mode=0o640)
            follow_umask(partial / "file")
    finally:
        os.umask(before)
    found = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out" / "file")]
    assert tuple(found) == modes
    assert names(tmp_path / "out") == ["file"]
    assert names(tmp_path) == ["out"]


def test_parents_that_were_there_stay(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError), atomic_directory(tmp_path / "runs" / "out"):
        raise ValueError
    assert names(tmp_path) == ["runs"]


def test_existing_output_is_refused_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]


def test_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        require_free_output(tmp_path / "out")


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not writable"):
        require_free_output(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("IoError: No space left on device (os error 28)"),
    ],
    ids=["OSError", "library error"],
)
def test_full_disk_is_named_whatever_raises_it(tmp_path, error):
    with (
        pytest.raises(EnvironmentFailure, match="no space left on device while writing"),
        atomic_directory(tmp_path / "out"),
    ):
        raise error
    assert names(tmp_path) == []


def test_full_disk_of_a_cache_is_not_taken_for_that_of_the_output(tmp_path):
    with (
        pytest.raises(EnvironmentFailure, match=r"while writing CACHE.*\n.*KUEA_MLLM_CACHE"),
        disk_errors_named(tmp_path / "out", remedy="Go on with --resume."),
        disk_errors_named("CACHE", remedy="Choose another place with $KUEA_MLLM_CACHE."),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json_is_strict_both_ways(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan.json", {"value": float("nan")})
    write_json(tmp_path / "good.json", {"name": "Käthe"})
    assert read_json(tmp_path / "good.json") == {"name": "Käthe"}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="missing"):
        read_json(tmp_path / "none.json")
    assert json.loads((tmp_path / "good.json").read_text())


def test_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    write_text(tmp_path / "report.html", "old")
    with monkeypatch.context() as patch:

        def no_space(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("pathlib.Path.replace", no_space)
        with pytest.raises(EnvironmentFailure):
            write_text(tmp_path / "report.html", "new")
    assert names(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
