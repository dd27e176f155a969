"""Full OpenAI CLIP dicts: the visual half of a tower, the text half of a base, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip_samples import edit, hf_model, openai_model, same, write_repository
from tower_samples import CLIP, SIGLIP, make_tower, write_torch
from typer.testing import CliRunner

from kuea_mllm.cli.main import app
from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.openai_export import export_openai, read_text_half, save_openai
from kuea_mllm.towers.writing.save import export_visual


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_round_trip_is_equal_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    full = openai_model().state_dict()
    base = write_torch(tmp_path / "base.pt", full)
    save_openai(load_tower(base), base, tmp_path / f"out{suffix}")
    assert same(read_checkpoint_file(tmp_path / f"out{suffix}"), full)


def test_float32_weights_are_not_rounded(tmp_path: Path) -> None:
    # Facts, trap 7: open_clip's builder for this format rounds to float16 on the way.
    full = openai_model().state_dict()
    assert not torch.equal(full["visual.conv1.weight"].half().float(), full["visual.conv1.weight"])
    tower = load_tower(write_torch(tmp_path / "full.pt", full))
    visual, _ = convert.split_openai(full)
    assert same(export_visual(tower), visual)


def test_tower_is_exchanged_and_the_text_half_kept(tmp_path: Path) -> None:
    full = openai_model().state_dict()
    half = {
        name: t.half() if t.ndim > 1 and not name.startswith("visual.") else t
        for name, t in full.items()
    }
    half["input_resolution"] = torch.tensor(224)
    half["context_length"] = torch.tensor(8)
    base = write_torch(tmp_path / "base.pt", half)
    tower = make_tower(CLIP, seed=5)
    save_openai(tower, base, tmp_path / "new.pt")
    found = read_checkpoint_file(tmp_path / "new.pt")
    assert found.keys() == half.keys()
    visual, text = convert.split_openai(found)
    assert same(visual, export_visual(tower))
    # The metadata that is about the vision half follows it; everything else is the base's.
    assert int(text.pop("input_resolution")) == CLIP.image_size
    assert same(text, {n: t for n, t in half.items() if n in text})
    assert load_tower(tmp_path / "new.pt").fingerprint == tower.fingerprint


def test_open_clips_own_builder_reads_the_file(tmp_path: Path) -> None:
    model = openai_model()
    base = write_torch(tmp_path / "base.pt", model.state_dict())
    save_openai(load_tower(base), base, tmp_path / "new.pt")
    state = dict(read_checkpoint_file(tmp_path / "new.pt"))
    built = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32)
    # It rounds to float16 by itself, so the weights are put in once more at full precision.
    built = built.float()
    built.load_state_dict(state)
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 16, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(built.encode_image(pixels), model.encode_image(pixels))
        torch.testing.assert_close(built.encode_text(tokens), model.encode_text(tokens))


def test_text_half_of_a_hugging_face_directory_is_converted_exactly(tmp_path: Path) -> None:
    model = hf_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    tower = load_tower(tmp_path / "base")
    full = export_openai(tower, read_text_half(tmp_path / "base"))
    assert full.keys() == openai_model().state_dict().keys()
    # There and back again.
    _, text = convert.split_openai(full)
    back = convert.openai_text_to_hf(text)
    original = model.state_dict()
    assert back
    assert all(torch.equal(back[name], original[name]) for name in back)
    assert torch.equal(full["logit_scale"], original["logit_scale"])
    # And open_clip computes the same from it.
    built = open_clip.model.build_model_from_openai_state_dict(full, cast_dtype=torch.float32)
    built = built.float()
    built.load_state_dict(full)
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 16, (2, 8))
    with torch.no_grad():
        images: Any = model.get_image_features(pixel_values=pixels)
        texts: Any = model.get_text_features(input_ids=tokens)
        torch.testing.assert_close(
            built.encode_image(pixels), images.pooler_output, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            built.encode_text(tokens), texts.pooler_output, rtol=1e-4, atol=1e-5
        )


def test_text_half_of_an_open_clip_repository_is_read(tmp_path: Path) -> None:
    model = write_repository(tmp_path, "quick_gelu")
    tower = make_tower(CLIP)
    text = read_text_half(tmp_path)
    assert (text.heads, text.width, text.layers, text.activation) == (2, 16, 1, "quick_gelu")
    # OpenAI's rule is one head for every 64, and no less than one.
    with pytest.raises(TowerError, match="2 heads for width 16"):
        export_openai(tower, text)
    edit(tmp_path, "model_cfg", text_cfg={"width": 16, "heads": 1})
    text = read_text_half(tmp_path)
    assert same(
        text.state, {n: t for n, t in model.state_dict().items() if not n.startswith("visual.")}
    )
    assert export_openai(tower, text)
    edit(tmp_path, "model_cfg", quick_gelu=False)
    with pytest.raises(TowerError, match="text tower has activation gelu"):
        export_openai(tower, read_text_half(tmp_path))
    edit(tmp_path, "model_cfg", text_cfg={"width": 16, "heads": 1, "no_causal_mask": True})
    with pytest.raises(TowerError, match=r"text_cfg\.no_causal_mask is True"):
        read_text_half(tmp_path)


def test_what_the_format_cannot_express_is_refused(tmp_path: Path) -> None:
    base = write_torch(tmp_path / "base.pt", openai_model().state_dict())
    text = read_text_half(base)
    with pytest.raises(TowerError, match="SigLIP tower"):
        export_openai(make_tower(SIGLIP), text)
    for change in ({"activation": "gelu"}, {"heads": 2}):
        with pytest.raises(TowerError, match="every reader would run another model"):
            export_openai(make_tower(replace(CLIP, **change)), text)
    with pytest.raises(TowerMismatch, match=r"in 32 numbers.*in 24"):
        export_openai(make_tower(replace(CLIP, embedding_width=32)), text)
    with pytest.raises(TowerError, match="no projection"):
        export_openai(make_tower(CLIP, with_projection=False), text)


def test_bases_without_text_half_are_refused(tmp_path: Path) -> None:
    full = openai_model().state_dict()
    visual, text = convert.split_openai(full)
    with pytest.raises(TowerError, match="no full CLIP state dict"):
        read_text_half(write_torch(tmp_path / "visual.pt", visual))
    del text["ln_final.bias"]
    path = write_torch(tmp_path / "cut.pt", convert.join_openai(visual, text))
    with pytest.raises(TowerError, match=r"lacks ln_final\.bias"):
        read_text_half(path)
    path = write_torch(tmp_path / "more.pt", full | {"logit_bias": torch.ones(1)})
    with pytest.raises(TowerError, match="unknown key logit_bias"):
        read_text_half(path)
    make_tower(CLIP).model.save_pretrained(tmp_path / "tower")
    with pytest.raises(TowerError, match="not a full CLIP"):
        read_text_half(tmp_path / "tower")
    hf_model(hidden_act="gelu").save_pretrained(tmp_path / "gelu")
    with pytest.raises(TowerError, match="activation gelu"):
        export_openai(make_tower(CLIP), read_text_half(tmp_path / "gelu"))
    hf_model(eos_token_id=7).save_pretrained(tmp_path / "eos")
    with pytest.raises(TowerError, match="read at their token 7"):
        export_openai(make_tower(CLIP), read_text_half(tmp_path / "eos"))


def test_command_line_writes_the_format(tmp_path: Path) -> None:
    full = openai_model().state_dict()
    base, out = write_torch(tmp_path / "base.pt", full), tmp_path / "new.pt"
    call = ["convert", str(base), str(out), "--to", "openai"]
    without = CliRunner().invoke(app, call)
    assert without.exit_code == 2
    assert "--text-from" in without.output
    assert not out.exists()
    given = CliRunner().invoke(app, [*call, "--text-from", str(base), "--json"])
    assert given.exit_code == 0, given.output
    assert json.loads(given.stdout)["to"] == "openai"
    assert same(read_checkpoint_file(out), full)
    stray = CliRunner().invoke(
        app,
        ["convert", str(base), str(tmp_path / "x.pt"), "--to=visual", "--text-from", str(base)],
    )
    assert stray.exit_code == 2
