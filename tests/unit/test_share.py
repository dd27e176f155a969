"""Sharing: what is checked before an upload, what is sent, and how the Hub's refusals read.

No network: `HfApi` is replaced by one that records what it is asked to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from kuea_mllm.adapters.registry import get_adapter
from kuea_mllm.errors import EnvironmentFailure, KueaError, UserError
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.model_card import read_front_matter
from kuea_mllm.share import check_upload, push_directory
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.card import render_card
from kuea_mllm.towers.writing.open_clip_export import read_open_clip_text, save_open_clip
from kuea_mllm.towers.writing.save import save_tower

REPO = "ada/aligned"
MANIFEST = {
    "kind": "tower",
    "base_tower": {"reference": "openai/clip-vit-large-patch14"},
    "objective": {"kernel_weight": 1.0},
    "data": {"images": "/home/ada/imagenet/train"},
    "command": "kuea-mllm align --images /home/ada/imagenet/train --out runs/x",
}


@dataclass
class FakeHub:
    """What the Hub holds, and what it was asked."""

    files: list[str] = field(default_factory=lambda: [".gitattributes"])
    private: bool = False
    failure: Exception | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)


class FakeApi:
    hub: ClassVar[FakeHub]
    endpoint = "https://huggingface.co"

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.hub.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.hub.failure is not None:
            raise self.hub.failure

    def repo_info(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(private=self.hub.private)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.hub.calls.append(("create_branch", options))

    def list_repo_files(self, repo_id: str, **_: Any) -> list[str]:
        return self.hub.files

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        self.hub.calls.append(("upload_folder", options))
        folder = Path(folder_path)
        for path in folder.rglob("*"):
            if path.is_file():
                self.hub.uploaded[path.relative_to(folder).as_posix()] = path.read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    FakeApi.hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return FakeApi.hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared") / "tower"
    save_tower(load_tower(ASSETS / "clip"), directory, manifest=MANIFEST)
    return directory


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini world's LLaVA with a tower that is not its own."""
    folder = tmp_path_factory.mktemp("swapped")
    base, out = shutil.copytree(ASSETS / "llava", folder / "llava-base"), folder / "llava"
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# The base\n")
    tower = load_tower(ASSETS / "clip")
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.mul_(1.01)
    swap_tower_files(base, tower, out, adapter=get_adapter("llava"), reference="org/llava")
    return out


@pytest.fixture
def tower(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "tower")


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_tower_is_uploaded_in_one_go(hub: FakeHub, tower: Path) -> None:
    before = snapshot(tower)
    assert push_directory(tower, REPO) == f"https://huggingface.co/{REPO}"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1]["exist_ok"] is True
    assert hub.calls[0][1]["private"] is None
    options = hub.calls[1][1]
    assert options["repo_id"] == REPO
    assert options["commit_message"].startswith("Upload tower with vision tower ")
    assert hub.uploaded.keys() == before.keys()
    assert hub.uploaded["model.safetensors"] == before["model.safetensors"]
    assert snapshot(tower) == before


def test_uploaded_record_names_no_path(hub: FakeHub, tower: Path) -> None:
    push_directory(tower, REPO)
    for name in ("kuea.json", "README.md", "config.json"):
        assert b"/home" not in hub.uploaded[name]
    record = json.loads(hub.uploaded["kuea.json"])
    assert record["data"]["images"] == "train"
    assert record["command"] == "kuea-mllm align --images train --out runs/x"
    assert record["base_tower"]["reference"] == "openai/clip-vit-large-patch14"
    assert b"/home/ada" in (tower / "kuea.json").read_bytes()


def test_uploaded_tower_is_the_tower(hub: FakeHub, tower: Path, tmp_path: Path) -> None:
    push_directory(tower, REPO)
    again = tmp_path / "again"
    again.mkdir()
    for name, content in hub.uploaded.items():
        (again / name).write_bytes(content)
    assert load_tower(again).fingerprint == load_tower(tower).fingerprint
    assert check_upload(again).rewritten == []


def test_code_in_the_uploaded_card_loads_the_repository(hub: FakeHub, tower: Path) -> None:
    push_directory(tower, REPO)
    card = hub.uploaded["README.md"].decode()
    assert f'CLIPVisionModelWithProjection.from_pretrained("{REPO}")' in card
    assert f"--tower {REPO}" in card
    assert "path/to/this/directory" not in card
    assert "path/to/this/directory" in (tower / "README.md").read_text()


def test_open_clip_repository_is_uploaded_too(hub: FakeHub, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "open_clip"
    save_open_clip(load_tower(tower), read_open_clip_text(ASSETS / "clip"), out, manifest=MANIFEST)
    record = json.loads((out / "kuea.json").read_text())
    (out / "README.md").write_text(render_card(record, library="open_clip"))
    push_directory(out, REPO)
    assert {"open_clip_config.json", "open_clip_model.safetensors"} <= hub.uploaded.keys()
    card = hub.uploaded["README.md"].decode()
    assert read_front_matter(card)["library_name"] == "open_clip"
    assert f'create_model_from_pretrained("hf-hub:{REPO}")' in card


def test_dry_run_asks_the_hub_nothing(hub: FakeHub, tower: Path) -> None:
    url = push_directory(tower, REPO, dry_run=True, revision="v2")
    assert url == f"https://huggingface.co/{REPO}/tree/v2"
    assert hub.calls == []


def test_revision_and_message_are_passed_on(hub: FakeHub, tower: Path) -> None:
    push_directory(tower, REPO, revision="v2", message="Second try")
    assert ("create_branch", {"branch": "v2", "repo_type": "model", "exist_ok": True}) in hub.calls
    assert hub.calls[-1][1]["revision"] == "v2"
    assert hub.calls[-1][1]["commit_message"] == "Second try"


def test_private_is_asked_for_and_never_silently_public(hub: FakeHub, tower: Path) -> None:
    with pytest.raises(UserError, match="exists and is public; nothing was uploaded"):
        push_directory(tower, REPO, private=True)
    assert hub.uploaded == {}
    hub.private = True
    push_directory(tower, REPO, private=True)
    assert hub.calls[-2][1]["private"] is True
    assert hub.uploaded


def test_other_weights_in_the_repository_are_refused(hub: FakeHub, tower: Path) -> None:
    hub.files += ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx"]
    with pytest.raises(UserError, match=r"does not replace \(onnx/model\.onnx and 1 more\)"):
        push_directory(tower, REPO)
    assert hub.uploaded == {}


def test_hidden_and_partial_files_stay_here(hub: FakeHub, tower: Path) -> None:
    (tower / ".cache").mkdir()
    (tower / ".cache" / "token.json").write_text("{}")
    for name in (".env", "model.safetensors.tmp", "run.log"):
        (tower / name).write_text("x")
    push_directory(tower, REPO)
    assert not {".cache/token.json", ".env", "model.safetensors.tmp", "run.log"} & set(hub.uploaded)


def test_swapped_model_is_uploaded_with_its_card(hub: FakeHub, swapped: Path) -> None:
    before = snapshot(swapped)
    assert check_upload(swapped).kind == "mllm"
    push_directory(swapped, REPO)
    assert hub.uploaded.keys() == before.keys()
    record = json.loads(hub.uploaded["kuea.json"])
    assert record["base"] == {"reference": "org/llava"}
    assert str(swapped.parent) not in hub.uploaded["kuea.json"].decode()
    card = read_front_matter(hub.uploaded["README.md"].decode())
    assert (card["license"], card["base_model"]) == ("llama2", ["org/llava"])
    assert hub.uploaded["model.safetensors"] == before["model.safetensors"]


def test_swapped_model_with_another_tower_inside_is_refused(
    hub: FakeHub, swapped: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(swapped, tmp_path / "changed")
    shutil.copy(ASSETS / "llava" / "model.safetensors", changed / "model.safetensors")
    with pytest.raises(UserError, match=r"is not what its kuea\.json says: the tower inside"):
        push_directory(changed, REPO)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_incomplete_model_is_refused(
    hub: FakeHub, swapped: Path, tmp_path: Path, name: str
) -> None:
    changed = shutil.copytree(swapped, tmp_path / "changed")
    (changed / name).unlink()
    with pytest.raises(UserError, match=r"changed (has no tokenizer|holds no weights)"):
        push_directory(changed, REPO)
    assert hub.calls == []


def remove(name: str) -> Callable[[Path], None]:
    return lambda tower: (tower / name).unlink()


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(tower: Path) -> None:
        content = json.loads((tower / name).read_text()) | changes
        (tower / name).write_text(json.dumps(content))

    return change


def edit_card(old: str, new: str) -> Callable[[Path], None]:
    def change(tower: Path) -> None:
        card = tower / "README.md"
        assert old in card.read_text()
        card.write_text(card.read_text().replace(old, new))

    return change


def change_weights(tower: Path) -> None:
    state = load_file(tower / "model.safetensors")
    first = next(name for name in sorted(state) if "encoder" in name)
    save_file(state | {first: state[first] + 1}, tower / "model.safetensors", {"format": "pt"})


def cut_weights(tower: Path) -> None:
    content = (tower / "model.safetensors").read_bytes()
    (tower / "model.safetensors").write_bytes(content[:-64])


UNFIT: dict[str, Callable[[Path], Any]] = {
    r"has no kuea\.json": remove("kuea.json"),
    r"has no model card": remove("README.md"),
    r"preprocessor_config\.json is missing": remove("preprocessor_config.json"),
    r"holds no weights": remove("model.safetensors"),
    r"kind 'calibration'; only tower, mllm and lora": edit_json("kuea.json", kind="calibration"),
    r"holds vision tower \w+, but its kuea\.json records": change_weights,
    r"model\.safetensors is cut short": cut_weights,
    r"does not state license": edit_card('license: "other"', ""),
    r"does not state base_model": edit_card("base_model: ", "base: "),
    r"README\.md names a path of this machine: /home/ada/secret": edit_card(
        "# KUEA", "see /home/ada/secret\n# KUEA"
    ),
    r"pytorch_model\.bin is no part of the weights": lambda tower: torch.save(
        {}, tower / "pytorch_model.bin"
    ),
    r"config\.json, key deep\.er\[0\], is a path of this machine": edit_json(
        "config.json", deep={"er": ["/mnt/models/clip"]}
    ),
}


@pytest.mark.parametrize("words", UNFIT)
def test_unfit_directory_is_refused_before_the_hub_is_asked(
    hub: FakeHub, tower: Path, words: str
) -> None:
    UNFIT[words](tower)
    with pytest.raises(UserError, match=words):
        push_directory(tower, REPO)
    assert hub.calls == []


@pytest.mark.parametrize("place", ["run.unfinished/tower", ".x.partial-123", "run.diverged/tower"])
def test_unfinished_directory_is_refused(hub: FakeHub, tower: Path, place: str) -> None:
    moved = tower.parent / place
    moved.parent.mkdir(exist_ok=True)
    tower.rename(moved)
    with pytest.raises(UserError, match="no finished result"):
        push_directory(moved, REPO)
    assert hub.calls == []


def test_traces_of_loading_are_left_out_of_settings(hub: FakeHub, tower: Path) -> None:
    edit_json("config.json", _name_or_path="/home/x/clip", model_type="clip_vision_model")(tower)
    push_directory(tower, REPO)
    config = json.loads(hub.uploaded["config.json"])
    assert "_name_or_path" not in config
    assert config["model_type"] == "clip_vision_model"


def test_base_model_can_be_named_for_a_card_without_it(hub: FakeHub, tower: Path) -> None:
    edit_card('base_model: "openai/clip-vit-large-patch14"\n', "")(tower)
    push_directory(tower, REPO, base_model="openai/clip-vit-base-patch16")
    assert b'base_model: "openai/clip-vit-base-patch16"' in hub.uploaded["README.md"]
    assert "patch16" not in (tower / "README.md").read_text()


def test_contradiction_of_the_card_is_refused(hub: FakeHub, tower: Path) -> None:
    with pytest.raises(UserError, match=r"names the base model openai/.*, not org/other"):
        push_directory(tower, REPO, base_model="org/other")
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["aligned", "a/b/c", "/x/y", "ada/", "-a/b"])
def test_name_that_is_no_repository_is_refused(hub: FakeHub, tower: Path, repo: str) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        push_directory(tower, repo, dry_run=True)


def test_offline_setting_is_respected(
    hub: FakeHub, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_directory(tower, REPO)
    assert hub.calls == []
    push_directory(tower, REPO, dry_run=True)


def http_error(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError("refused", response=httpx.Response(status, request=request))


FAILURES: list[tuple[Exception, type[KueaError], str]] = [
    (LocalTokenNotFoundError("no token"), UserError, "hf auth login"),
    (http_error(401), UserError, "does not accept the token"),
    (http_error(403), UserError, "may not write to ada/aligned"),
    (http_error(503), EnvironmentFailure, "answered 503"),
    (httpx.ConnectError("name or service not known"), EnvironmentFailure, "Check the network"),
    (TimeoutError("timed out"), EnvironmentFailure, "TimeoutError: timed out"),
]


@pytest.mark.parametrize(("failure", "kind", "words"), FAILURES)
def test_failure_of_the_hub_is_one_line_with_a_remedy(
    hub: FakeHub, tower: Path, failure: Exception, kind: type[KueaError], words: str
) -> None:
    hub.failure = failure
    with pytest.raises(kind, match=words) as raised:
        push_directory(tower, REPO)
    assert raised.value.remedy
    assert hub.uploaded == {}
