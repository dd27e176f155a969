from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kuea_mllm.adapters import registry
from kuea_mllm.adapters.base import AdapterManifest
from kuea_mllm.errors import UserError

OTHER = AdapterManifest("other", "another one", "no_such_module_here:Adapter")
WRONG_CLASS = AdapterManifest("wrong", "no adapter", "builtins:dict")
MISNAMED = AdapterManifest("something", "calls itself something else", "builtins:dict")
NOT_A_MANIFEST = {"name": "text"}


def install(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, registry.GROUP) for name, value in entries]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


LLAVA = ("llava", "kuea_mllm.adapters.llava:MANIFEST")


def test_llava_is_found() -> None:
    assert "llava" in [manifest.name for manifest in registry.list_manifests()]
    assert registry.get_adapter("llava").name == "llava"


def test_listing_and_recognising_import_no_torch(tiny_llava: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from kuea_mllm.adapters import registry\n"
        "registry.list_manifests()\n"
        "registry.adapter_for(Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_llava)], check=True)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean llava"):
        registry.get_adapter("lava")


def test_nothing_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(UserError, match="None is installed"):
        registry.get_adapter("llava")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no_such_module_here:MANIFEST", "No module named"),
        ("json:NO_SUCH_NAME", "NO_SUCH_NAME"),
        ("json:dumps", "not an AdapterManifest"),
        ("test_registry:MISNAMED", "calls itself 'something'"),
    ],
)
def test_broken_entry_point_does_not_take_down_the_others(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, value: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    install(monkeypatch, ("broken", value), LLAVA)
    assert [manifest.name for manifest in registry.list_manifests()] == ["llava"]
    assert words in registry.broken_adapters()["broken"]
    assert registry.adapter_for(tiny_llava).name == "llava"
    with pytest.raises(UserError, match=r"adapter 'broken' cannot be used: .*" + words):
        registry.get_adapter("broken")


@pytest.mark.parametrize("name", ["OTHER", "WRONG_CLASS"])
def test_unusable_factory_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    manifest: AdapterManifest = globals()[name]
    install(monkeypatch, (manifest.name, f"test_registry:{name}"), LLAVA)
    assert registry.adapter_for(tiny_llava).name == "llava"
    with pytest.raises(UserError, match=f"'{manifest.name}'"):
        registry.get_adapter(manifest.name)


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, LLAVA, ("llava", "elsewhere:MANIFEST"))
    assert registry.list_manifests() == []
    with pytest.raises(UserError, match=r"both kuea_mllm.* and elsewhere:MANIFEST"):
        registry.get_adapter("llava")


def test_entry_listed_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, LLAVA, LLAVA)
    assert len(registry.list_manifests()) == 1


def test_unrecognised_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"no adapter recognises .*'bert'"):
        registry.adapter_for(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "missing"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_unreadable_configuration_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        registry.adapter_for(tmp_path)


def test_absent_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        registry.adapter_for(tmp_path / "nowhere")
