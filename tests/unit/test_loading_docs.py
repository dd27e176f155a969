"""The code of docs/loading.md: runs, or, where a server would be needed, can at least be read.

Every block is marked with a comment that names it and says how it is checked. The names in the
blocks (`runs/aligned/tower`, `openai/...`, `models/llava-aligned`) exist here as tiny models.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kuea_mllm.adapters.llava.images import PaddedImages
from kuea_mllm.adapters.llava.prompt import build_prompt
from kuea_mllm.adapters.registry import get_adapter
from kuea_mllm.cli.main import app
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower

PAGE = Path(__file__).parents[2] / "docs" / "loading.md"
BASE = "openai/clip-vit-large-patch14-336"
BLOCK = re.compile(r"(?:<!-- snippet: (\S+), (run|parsed) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)

ALL = [match.groups() for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
BLOCKS = {name: (how, language, code) for name, how, language, code in ALL if name}


def names(how: str, language: str) -> list[str]:
    return [name for name, block in BLOCKS.items() if block[:2] == (how, language)]


@pytest.fixture(scope="module")
def tower() -> Tower:
    """The mini world's tower, moved a little, as an alignment would."""
    found = load_tower(ASSETS / "clip")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * parameter.std() * noise if parameter.numel() > 1 else 0)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tower: Tower) -> Path:
    """A folder that holds everything that the page names."""
    folder = tmp_path_factory.mktemp("page")
    manifest = {"kind": "tower", "base_tower": {"reference": BASE}, "objective": {}}
    save_tower(tower, folder / "runs" / "aligned" / "tower", manifest=manifest)
    shutil.copytree(ASSETS / "clip", folder / BASE)
    aligned = load_tower(folder / "runs" / "aligned" / "tower")
    aligned.source = "runs/aligned/tower"
    swap_tower_files(
        published_llava(folder / "llava-hf"),
        aligned,
        folder / "models" / "llava-aligned",
        adapter=get_adapter("llava"),
        reference="llava-hf/llava-1.5-7b-hf",
    )
    Image.effect_noise((48, 40), 64).convert("RGB").save(folder / "photo.jpg")
    return folder


def published_llava(out: Path) -> Path:
    """Write the mini world's LLaVA with the key names and the template of published ones."""
    shutil.copytree(ASSETS / "llava", out)
    state = load_file(out / "model.safetensors")
    nested = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", k): state[k] for k in state}
    save_file(nested, out / "model.safetensors", {"format": "pt"})
    (out / "chat_template.json").write_text('{"chat_template": "USER: {{ messages }} ASSISTANT:"}')
    (out / "README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    return out


@pytest.fixture(scope="module")
def outcomes(world: Path) -> dict[str, list[Any]]:
    """Run the page's commands in their order; later blocks read what they write."""
    found: dict[str, list[Any]] = {}
    with contextlib.chdir(world):
        for name in names("run", "bash"):
            lines = BLOCKS[name][2].strip().splitlines()
            words = [shlex.split(line) for line in lines]
            assert all(program == "kuea-mllm" for program, *_ in words)
            found[name] = [CliRunner().invoke(app, arguments) for _, *arguments in words]
    return found


@pytest.fixture
def run(
    world: Path, outcomes: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run Python blocks one after the other in the same namespace, inside of the world."""
    monkeypatch.chdir(world)
    tiny_open_clip(monkeypatch, tmp_path)

    def execute(*blocks: str) -> dict[str, Any]:
        scope: dict[str, Any] = {}
        for name in blocks:
            weights = f'pretrained="{tmp_path / "openai.pt"}"'
            code = BLOCKS[name][2].replace('pretrained="openai"', weights)
            exec(compile(code, f"docs/loading.md:{name}", "exec"), scope)  # noqa: S102
        return scope

    return execute


def tiny_open_clip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let open_clip build the mini world's CLIP under the name that the page uses."""
    factory: Any = pytest.importorskip("open_clip.factory")
    vision = json.loads((ASSETS / "clip" / "config.json").read_text())["vision_config"]
    text = json.loads((ASSETS / "clip" / "config.json").read_text())["text_config"]
    config = {
        "embed_dim": vision["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
        },
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-L-14-336", config)
    # In the place of OpenAI's weights, whose text half the page keeps.
    whole = factory.create_model("ViT-L-14-336", force_quick_gelu=True)
    torch.save(whole.state_dict(), folder / "openai.pt")


def test_every_block_says_how_it_is_checked() -> None:
    unmarked = [code for name, _, _, code in ALL if name is None]
    assert unmarked == []
    assert len(ALL) == len(BLOCKS)
    assert len(names("run", "python")) >= 5


@pytest.mark.parametrize("name", names("parsed", "python"))
def test_python_that_is_not_run_is_python_with_the_prompt_of_the_authors(name: str) -> None:
    nodes = ast.walk(ast.parse(BLOCKS[name][2]))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert build_prompt("What is in the picture?", image_count=1) in strings


@pytest.mark.parametrize("name", names("parsed", "bash"))
def test_shell_that_is_not_run_is_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", BLOCKS[name][2]], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_request_to_a_server_is_json() -> None:
    words = shlex.split(BLOCKS["chat-request"][2])
    body = json.loads(words[words.index("-d") + 1])
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]


@pytest.mark.parametrize("name", names("run", "bash"))
def test_commands_of_the_page_work(outcomes: dict[str, list[Any]], name: str) -> None:
    for result in outcomes[name]:
        assert result.exit_code == 0, result.output


def test_tower_gives_embedding_and_patches(
    run: Callable[..., dict[str, Any]], tower: Tower
) -> None:
    found = run("tower")
    spec = tower.spec
    assert found["embedding"].shape == (1, spec.embedding_width)
    assert found["patches"].shape == (1, spec.grid**2, spec.width)
    model: Any = tower.model
    with torch.no_grad():
        expected = model(pixel_values=found["pixels"]).image_embeds
    torch.testing.assert_close(found["embedding"], expected)


def test_text_tower_of_the_base_understands_the_tower(
    run: Callable[..., dict[str, Any]],
) -> None:
    found = run("zero-shot")
    assert found["cosines"].shape == (2,)
    assert float(found["cosines"].abs().max()) <= 1.0
    assert float(found["probabilities"].sum()) == pytest.approx(1.0)


def test_swapped_llava_answers_with_the_new_tower(
    run: Callable[..., dict[str, Any]], tower: Tower
) -> None:
    found = run("llava")
    assert isinstance(found["text"], str)
    # The page's few lines do what the adapter does; the picture is not square.
    spec = tower.spec
    padded = PaddedImages(spec.image_size, spec.mean, spec.std)([found["image"]])
    torch.testing.assert_close(found["inputs"]["pixel_values"], padded)
    assert found["prompt"] == build_prompt("What is in the picture?", image_count=1)
    inside = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in found["model"].model.vision_tower.state_dict().items()
    }
    expected = tower.canonical_state()
    key = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(inside[key], expected[key])


def outputs_of(tower: Tower, pixels: torch.Tensor) -> Any:
    model: Any = tower.model
    with torch.no_grad():
        return model(pixel_values=pixels, output_hidden_states=True)


def test_open_clip_gives_the_same_embedding_and_patches(
    run: Callable[..., dict[str, Any]], tower: Tower
) -> None:
    found = run("open-clip", "open-clip-patches")
    expected = outputs_of(tower, found["pixels"])
    torch.testing.assert_close(found["embedding"], expected.image_embeds, atol=2e-5, rtol=1e-4)
    taken = expected.hidden_states[-2][:, 1:]
    torch.testing.assert_close(found["patches"], taken, atol=2e-5, rtol=1e-4)


def test_open_clip_repository_gives_the_same_embedding(
    run: Callable[..., dict[str, Any]], tower: Tower
) -> None:
    found = run("open-clip-repository")
    expected = outputs_of(tower, found["pixels"]).image_embeds
    torch.testing.assert_close(found["embedding"], expected, atol=2e-5, rtol=1e-4)


def test_gelu_instead_of_quick_gelu_is_the_silent_trap_that_the_page_names(
    run: Callable[..., dict[str, Any]], tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = BLOCKS["open-clip"][2].replace(", force_quick_gelu=True", "")
    assert code != BLOCKS["open-clip"][2]
    monkeypatch.setitem(BLOCKS, "open-clip", ("run", "python", code))
    found = run("open-clip")
    expected = outputs_of(tower, found["pixels"]).image_embeds
    assert float((found["embedding"] - expected).abs().max()) > 1e-3


def test_tokens_of_output_tokens_are_not_those_that_llava_reads(
    run: Callable[..., dict[str, Any]], tower: Tower
) -> None:
    found = run("open-clip")
    visual = found["model"].visual
    visual.output_tokens = True
    expected = outputs_of(tower, found["pixels"])
    body: Any = getattr(tower.model, "vision_model", tower.model)
    with torch.no_grad():
        _, tokens = visual(found["pixels"])
        normed = body.post_layernorm(expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(tokens, normed, atol=2e-5, rtol=1e-4)
    assert float((tokens - expected.hidden_states[-2][:, 1:]).abs().max()) > 0.1


def test_served_directory_has_what_servers_read(run: Callable[..., dict[str, Any]]) -> None:
    assert run("served-directory")["report"] == {
        "architectures": ["LlavaForConditionalGeneration"],
        "tower names": "nested",
        "chat template": True,
        "tokenizer": True,
        "image processor": True,
    }


def test_resaved_model_is_seen_to_have_flat_names(
    run: Callable[..., dict[str, Any]], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = world / "flat" / "models"
    shutil.copytree(ASSETS / "llava", flat / "llava-aligned", dirs_exist_ok=True)
    monkeypatch.chdir(flat.parent)
    report = run_in_place("served-directory")["report"]
    assert (report["tower names"], report["chat template"]) == ("flat", False)


def run_in_place(name: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS[name][2], name, "exec"), scope)  # noqa: S102
    return scope
