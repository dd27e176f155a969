"""`kuea-mllm convert` on the mini world: what is printed, written and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from kuea_mllm.adapters import registry
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.towers.reading.load import load_tower

CLIP = ASSETS / "clip"
STATED = ["--activation=quick_gelu", "--heads=2"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parity_is_printed_and_recorded(kuea, tmp_path):
    out = tmp_path / "hf"
    answer = kuea("convert", CLIP, out)
    assert answer.code == 0, answer.err
    for text in ("embedding", "penultimate patch tokens", "last patch tokens", "4 probe images"):
        assert text in answer.out
    assert "source in transformers against destination in transformers" in answer.out
    parity = json.loads((out / "kuea.json").read_text())["conversion"]["parity"]
    assert all(row["relative_l2"] <= 1e-4 for report in parity for row in report["rows"])
    assert len(parity[0]["rows"]) == 3


def test_json_holds_the_same(kuea, tmp_path):
    out = tmp_path / "final.pt"
    answer = kuea("convert", CLIP, out, "--to=visual", "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert (record["from"], record["to"], record["dtype"]) == ("hf_directory", "visual", "float32")
    assert record["fingerprint"] == load_tower(CLIP).fingerprint
    assert record["parity"][0]["second"] == "destination in open_clip"
    assert record["changes"] == {}


def test_check_can_be_left_out(kuea, tmp_path):
    answer = kuea("convert", CLIP, tmp_path / "hf", "--no-check", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["parity"] == []


def test_every_format_of_a_full_model(kuea, tmp_path):
    """From transformers through all formats and back, with the text tower of the mini world."""
    text = f"--text-from={CLIP}"
    assert kuea("convert", CLIP, tmp_path / "repo", "--to=open_clip", text).code == 0
    assert kuea("convert", tmp_path / "repo", tmp_path / "v.pt", "--to=visual").code == 0
    answer = kuea("convert", tmp_path / "v.pt", tmp_path / "back", text, *STATED)
    assert answer.code == 0, answer.err
    original, back = (load_file(d / "model.safetensors") for d in (CLIP, tmp_path / "back"))
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
    model, info = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.text_config.vocab_size == len(
        original["text_model.embeddings.token_embedding.weight"]
    )
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert (tmp_path / "repo" / "tokenizer.json").exists()


def test_open_clip_opens_the_repository_and_embeds_the_same(kuea, tmp_path):
    import open_clip

    place = tmp_path / "repo"
    assert kuea("convert", CLIP, place, "--to=open_clip", f"--text-from={CLIP}").code == 0
    built, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{place}")
    theirs = CLIPModel.from_pretrained(CLIP).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{place}")
    pixels = torch.rand(2, 3, 32, 32)
    tokens = tokenizer(["a red seven on green", "a small three"])
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=pixels).pooler_output
        texts = theirs.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(built.eval().encode_image(pixels), images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(built.encode_text(tokens), texts, rtol=1e-4, atol=1e-5)
    assert preprocess.transforms[0].size == 32


def test_changes_are_only_made_when_asked_and_are_printed(kuea, tmp_path):
    asked = ["--image-size=48", "--dtype=bfloat16"]
    answer = kuea("convert", CLIP, tmp_path / "hf", *asked)
    assert answer.code == 0, answer.err
    assert "resized from 32 to 48 pixels: position embeddings bicubic with antialias" in answer.out
    assert "cast from float32 to bfloat16: rounded by" in answer.out
    assert "embeddings moved by" in answer.out
    tower = load_tower(tmp_path / "hf", dtype=None)
    assert tower.spec.image_size == 48
    assert tower.model.dtype == torch.bfloat16
    up = kuea("convert", tmp_path / "hf", tmp_path / "up", "--dtype=float32")
    assert "cast from bfloat16 to float32: exact, no value was rounded" in up.out


def test_mixes_are_written_one_or_many(kuea, tmp_path):
    tuned = load_tower(CLIP)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.mul_(1.01)
    from kuea_mllm.towers.writing.save import save_tower

    save_tower(tuned, tmp_path / "tuned", manifest={})
    mix = ["convert", tmp_path / "tuned", tmp_path / "out", f"--original={CLIP}"]
    answer = kuea(*mix, "--interpolate=0,0.5,1", "--json")
    assert answer.code == 0, answer.err
    results = json.loads(answer.out)["results"]
    assert names(tmp_path / "out") == ["0", "0.5", "1"]
    assert results[0]["fingerprint"] == load_tower(CLIP).fingerprint
    assert results[2]["fingerprint"] == tuned.fingerprint
    assert results[1]["destination"] == str(tmp_path / "out" / "0.5")
    mix[2] = tmp_path / "one"
    one = kuea(*mix, "--interpolate=0.5")
    assert one.code == 0, one.err
    assert "mixed: 0.5 of it" in one.out
    assert load_tower(tmp_path / "one").fingerprint == results[1]["fingerprint"]


REFUSED = {
    "no destination": ([CLIP], "DESTINATION"),
    "openai without text": ([CLIP, "out.pt", "--to=openai"], "--text-from"),
    "open_clip without text": ([CLIP, "out", "--to=open_clip"], "--text-from"),
    "mix without original": ([CLIP, "out", "--interpolate=0.5"], "go together"),
    "mix of words": ([CLIP, "out", "--interpolate=a", f"--original={CLIP}"], "no number"),
    "mix out of range": ([CLIP, "out", "--interpolate=2", f"--original={CLIP}"], "from 0 to 1"),
    "tower without mllm": ([CLIP, "out", f"--tower={CLIP}"], "--mllm"),
    "push of a file": ([CLIP, "out.pt", "--to=visual", "--push=a/b"], "--push"),
    "push to no repository": ([CLIP, "out", "--push=nonsense"], "OWNER/NAME"),
    "unknown adapter": ([CLIP, "out", "--mllm=nothing"], "no adapter named 'nothing'"),
    "suffix": ([CLIP, "out.onnx", "--to=visual"], "NAME.safetensors"),
    "size": ([CLIP, "out", "--image-size=44"], "no multiple of the patch size"),
    "activation": ([CLIP, "out", "--activation=gelu"], "hidden_act quick_gelu"),
    "missing": (["gone.pt", "out"], "there is no file or directory gone.pt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(kuea, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, expected = REFUSED[name]
    answer = kuea("convert", *arguments)
    assert answer.code == 2
    assert expected in answer.err
    assert "Traceback" not in answer.err
    assert not names(tmp_path)


def test_activation_that_is_not_stated_is_asked_for(kuea, tmp_path):
    assert kuea("convert", CLIP, tmp_path / "v.pt", "--to=visual", "--no-check").code == 0
    answer = kuea("convert", tmp_path / "v.pt", tmp_path / "hf", "--heads=2")
    assert answer.code == 2
    assert "does not state its activation" in answer.err
    assert names(tmp_path) == ["v.pt"]


def test_source_that_contradicts_itself_is_not_converted(kuea, tmp_path):
    """Its own library reads another tower than we do: no name for what is written."""
    shutil.copytree(CLIP, tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    answer = kuea("convert", tmp_path / "source", tmp_path / "hf")
    assert answer.code == 2
    assert "model.safetensors" in answer.err
    assert names(tmp_path) == ["source"]


class Importer:
    """An adapter that makes a directory of a released model."""

    name = "released"
    seen = None

    def import_released(self, source, destination, *, tower, command):
        type(self).seen = (source, destination, tower, command)
        destination.mkdir()


def test_whole_models_go_to_their_adapter(kuea, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "get_adapter", lambda name: Importer())
    out = tmp_path / "out"
    answer = kuea("convert", tmp_path, out, "--mllm=released", f"--tower={CLIP}", "--json")
    assert answer.code == 0, answer.err
    source, destination, tower, command = Importer.seen
    assert (source, destination, tower) == (tmp_path, out, str(CLIP))
    assert isinstance(command, str)
    assert json.loads(answer.out) == {"destination": str(out), "to": "hf", "mllm": "released"}
    monkeypatch.setattr(registry, "get_adapter", lambda name: object())
    refused = kuea("convert", tmp_path, tmp_path / "other", "--mllm=x")
    assert refused.code == 2
    assert "cannot convert whole models" in refused.err


def test_result_is_pushed_when_asked(kuea, tmp_path, monkeypatch):
    from kuea_mllm import share

    pushed = []

    def push_directory(directory, repo_id):
        pushed.append((directory, repo_id))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(share, "push_directory", push_directory)
    answer = kuea("convert", CLIP, tmp_path / "hf", "--push=a/b", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["pushed_to"] == "https://hub/a/b"
    assert pushed == [(tmp_path / "hf", "a/b")]
