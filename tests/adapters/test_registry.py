from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
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


class Greedy:
    """An adapter that recognises everything."""

    name = "greedy"

    def recognises(self, config: Mapping[str, object]) -> bool:
        return True

    check_base = tower_slot = vision_module = open_runtime = recognises


SPECIFIC = AdapterManifest("specific", "takes everything", "test_registry:Greedy")
FALLBACK = AdapterManifest("fallback", "the rest", "test_registry:Greedy", is_fallback=True)
UNLOADABLE = AdapterManifest("bad_rest", "broken rest", "no_such_module:A", is_fallback=True)


def test_fallback_is_asked_only_for_what_nobody_recognises(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    install(monkeypatch, ("fallback", "test_registry:FALLBACK"), LLAVA)
    assert registry.adapter_for(tiny_llava).name == "llava"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert isinstance(registry.adapter_for(tmp_path), Greedy)


def test_two_specific_adapters_are_ambiguous(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    install(monkeypatch, ("specific", "test_registry:SPECIFIC"), LLAVA)
    with pytest.raises(UserError, match="recognised by several adapters: llava, greedy"):
        registry.adapter_for(tiny_llava)


def test_fallback_is_not_loaded_where_it_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    install(monkeypatch, ("bad_rest", "test_registry:UNLOADABLE"), LLAVA)
    assert registry.adapter_for(tiny_llava).name == "llava"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"These adapters failed: bad_rest"):
        registry.adapter_for(tmp_path)


def test_fallback_in_the_place_of_a_broken_adapter_is_said(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    install(monkeypatch, ("other", "test_registry:OTHER"), ("fallback", "test_registry:FALLBACK"))
    with caplog.at_level("WARNING", logger="kuea_mllm"):
        assert isinstance(registry.adapter_for(tiny_llava), Greedy)
    assert "these failed before they could be asked: other (" in caplog.text


def test_generic_adapter_is_the_fallback(
    monkeypatch: pytest.MonkeyPatch, tiny_llava: Path, tmp_path: Path
) -> None:
    install(monkeypatch, ("hf_vlm", "kuea_mllm.adapters.hf_vlm:MANIFEST"), LLAVA)
    assert registry.adapter_for(tiny_llava).name == "llava"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    assert registry.adapter_for(tmp_path).name == "hf_vlm"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="no adapter recognises"):
        registry.adapter_for(tmp_path)


def test_entry_listed_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, LLAVA, LLAVA)
    assert len(registry.list_manifests()) == 1


def test_unrecognised_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"no adapter recognises .*'bert'"):
        registry.adapter_for(tmp_path)


def test_model_with_code_of_its_own_is_refused_as_such(tmp_path: Path) -> None:
    content = {"model_type": "llava_qwen", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"brings its own code \(auto_map\), which is never run"):
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


@pytest.mark.parametrize("part", [".", "adapter"])
def test_lora_weights_are_no_model(part: str, tmp_path: Path) -> None:
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds LoRA weights, not a model") as caught:
        registry.adapter_for(tmp_path)
    assert f"kuea-mllm merge {tmp_path} MERGED" in str(caught.value)


def test_directory_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing") as caught:
        registry.adapter_for(tmp_path)
    assert "local Hugging Face model directory" in str(caught.value)
