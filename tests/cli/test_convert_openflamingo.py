"""`kuea-mllm convert --mllm openflamingo`: the parts of a release to one directory and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kuea_mllm.miniworld import ASSETS

# A small release in the layout of the authors' files (see tests/golden/openflamingo/index.json).
RELEASE = Path(__file__).parents[1] / "golden" / "openflamingo"
CHECKPOINT = RELEASE / "flamingo" / "checkpoint.safetensors"
LANGUAGE_MODEL = f"--language-model={RELEASE / 'lm'}"
TOWER = [f"--tower={RELEASE / 'vision' / 'visual.safetensors'}", "--activation=quick_gelu"]


def heads():
    vision = json.loads((RELEASE / "index.json").read_text())["config"]["vision"]
    return f"--heads={vision['width'] // vision['head_width']}"


PARTS = [LANGUAGE_MODEL, *TOWER, heads(), "--mllm=openflamingo"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    from typer.testing import CliRunner

    from kuea_mllm.cli.main import app

    out = tmp_path_factory.mktemp("flamingo") / "hf"
    answer = CliRunner().invoke(app, ["convert", str(CHECKPOINT), str(out), *PARTS])
    assert answer.exit_code == 0, answer.stderr
    return out


def tensors(directory):
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_parts_make_a_directory_that_says_how_it_was_made(kuea, tmp_path):
    out = tmp_path / "hf"
    answer = kuea("convert", CHECKPOINT, out, *PARTS, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"destination": str(out), "to": "hf", "mllm": "openflamingo"}
    record = json.loads((out / "kuea.json").read_text())
    assert record["imported"]["checkpoint"] == str(CHECKPOINT.resolve())
    assert record["imported"]["language_model"] == str((RELEASE / "lm").resolve())
    verified = kuea("verify", out, "--json")
    assert verified.code == 0, verified.out


def test_there_and_back_is_equal_bit_for_bit(kuea, converted, tmp_path):
    back = tmp_path / "released"
    answer = kuea("convert", converted, back, "--mllm=openflamingo", "--to=released", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["to"] == "released"
    checkpoint = torch.load(back / "checkpoint.pt", weights_only=True)
    assert_same(checkpoint, load_file(CHECKPOINT))
    language_model = load_file(back / "language_model" / "model.safetensors")
    original = load_file(RELEASE / "lm" / "model.safetensors")
    embedding = "transformer.wte.weight"
    # The released one is longer or shorter: the trained rows replace it.
    assert torch.equal(language_model[embedding], checkpoint["lang_encoder." + embedding])
    del language_model[embedding], original[embedding]
    assert_same(language_model, original)

    again = kuea("convert", back, tmp_path / "again", "--mllm=openflamingo")
    assert again.code == 0, again.err
    assert_same(tensors(tmp_path / "again"), tensors(converted))
    for file in ("config.json", "processor_config.json", "tokenizer.json"):
        found, expected = (
            json.loads((d / file).read_text()) for d in (tmp_path / "again", converted)
        )
        assert found == expected, file


def test_stated_tokenizer_is_taken(kuea, tmp_path):
    bare = tmp_path / "lm"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(RELEASE / "lm" / name, bare / name)
    parts = [*PARTS[1:], f"--language-model={bare}"]
    refused = kuea("convert", CHECKPOINT, tmp_path / "out", *parts)
    assert refused.code == 2
    assert "tokenizer" in refused.err
    answer = kuea("convert", CHECKPOINT, tmp_path / "out", *parts, f"--tokenizer={RELEASE / 'lm'}")
    assert answer.code == 0, answer.err


def test_converted_model_takes_a_tower_and_gives_it_back(kuea, converted, tmp_path):
    """Swap, verify and swap back through the command line alone."""
    generator = torch.Generator().manual_seed(0)
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    weights = load_file(RELEASE / "vision" / "visual.safetensors")
    noise = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in weights.items()}
    save_file(noise, other)
    stated = ["--mllm=openflamingo", "--activation=quick_gelu", heads(), "--no-drift"]
    answer = kuea(
        "swap", f"--base={converted}", f"--tower={other}", f"--out={tmp_path / 'one'}", *stated
    )
    assert answer.code == 0, answer.err
    named = [f"--tower={other}", "--activation=quick_gelu", heads()]
    assert kuea("verify", tmp_path / "one", *named).code == 0
    assert kuea("verify", converted, *named).code == 2
    answer = kuea(
        *("swap", f"--base={tmp_path / 'one'}", f"--tower={converted}"),
        *(f"--out={tmp_path / 'two'}", "--mllm=openflamingo", "--no-drift"),
    )
    assert answer.code == 0, answer.err
    assert_same(tensors(tmp_path / "two"), tensors(converted))


FLAMINGO = "--mllm=openflamingo"
REFUSED = {
    "no language model": ([CHECKPOINT, "out", FLAMINGO, *TOWER], "--language-model"),
    "missing checkpoint": (["gone.pt", "out", *PARTS], "there is no checkpoint gone.pt"),
    "directory without parts": ([ASSETS, "out", FLAMINGO], "not laid out as expected"),
    "parts without mllm": ([CHECKPOINT, "out", LANGUAGE_MODEL], "go with --mllm"),
    "released without mllm": ([ASSETS / "clip", "out", "--to=released"], "go with --mllm"),
    "rounding": ([CHECKPOINT, "out", *PARTS, "--dtype=float16"], "whole model as it is"),
    "another format": ([CHECKPOINT, "out", *PARTS, "--to=visual"], "whole model as it is"),
    "back with parts": ([ASSETS, "out", *PARTS, "--to=released"], "everything from SOURCE"),
    "back from a tower": (
        [ASSETS / "clip", "out", FLAMINGO, "--to=released"],
        "model_type 'clip', expected 'openflamingo'",
    ),
    "back of llava": (
        [ASSETS / "llava", "out", "--mllm=llava", "--to=released"],
        "no way back to its authors' files",
    ),
    "llava in parts": (
        [ASSETS / "llava", "out", "--mllm=llava", LANGUAGE_MODEL],
        "released in one directory",
    ),
    "language model of another kind": (
        [CHECKPOINT, "out", *PARTS, f"--language-model={ASSETS / 'llava'}"],
        "only mosaic_gpt",
    ),
    "tower of another width": (
        [CHECKPOINT, "out", FLAMINGO, LANGUAGE_MODEL, f"--tower={ASSETS / 'clip'}"],
        "tower's width is 64",
    ),
    "unstated activation": (
        [CHECKPOINT, "out", FLAMINGO, LANGUAGE_MODEL, TOWER[0], heads()],
        "does not state its activation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(kuea, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, expected = REFUSED[name]
    answer = kuea("convert", *arguments)
    assert answer.code == 2
    assert expected in " ".join(answer.err.replace("│", " ").split())
    assert "Traceback" not in answer.err
    assert not list(tmp_path.iterdir())
