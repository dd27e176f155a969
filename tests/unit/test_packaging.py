"""What a wheel would hold."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"adapters": "kuea_mllm.adapters", "recipes": "kuea_mllm.recipes"}


def packages_in(folder, name):
    return {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for path in (ROOT / folder).rglob("__init__.py")
    }


def test_every_package_of_the_tree_is_listed():
    found = packages_in("kuea_mllm", "kuea_mllm")
    for folder, name in MAPPED.items():
        found |= packages_in(folder, name)
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("package", SETTINGS["tool"]["setuptools"]["package-data"])
def test_every_data_pattern_matches_something(package):
    folder = ROOT / MAPPED.get(package, package).replace(".", "/")
    if package in MAPPED.values():
        folder = ROOT / package.rpartition(".")[2]
    for pattern in SETTINGS["tool"]["setuptools"]["package-data"][package]:
        assert any(path.is_file() for path in folder.glob(pattern)), pattern


def test_every_shipped_asset_matches_a_pattern():
    folder = ROOT / "kuea_mllm" / "miniworld"
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["kuea_mllm.miniworld"]
    matched = {path for pattern in patterns for path in folder.glob(pattern)}
    shipped = {path for path in (folder / "assets").rglob("*") if path.is_file()}
    assert shipped
    assert shipped <= matched


def test_entry_points_can_be_loaded():
    adapters = entry_points(group="kuea_mllm.adapters")
    assert "llava" in {point.name for point in adapters}
    for point in adapters:
        assert point.load() is not None
    assert "kuea_mllm" in {point.name for point in entry_points(group="lmms_eval.models")}


def test_lock_file_names_no_registry():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert all("==" in line for line in lock.splitlines() if line and not line.startswith("#"))


def test_lock_holds_every_direct_dependency():
    locked = {
        line.partition("==")[0].replace("_", "-").lower()
        for line in (ROOT / "requirements.lock").read_text().splitlines()
    }
    groups = SETTINGS["project"]["optional-dependencies"]
    wanted = [*SETTINGS["project"]["dependencies"], *groups["dev"]]
    names = {text.split(";")[0].strip() for text in wanted}
    for name in names:
        plain = name.split(">")[0].split("=")[0].strip().replace("_", "-").lower()
        assert plain in locked
