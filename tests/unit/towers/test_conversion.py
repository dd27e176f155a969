"""Conversions between all formats: bit for bit, in every dtype, compared before they are named."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_samples import hf_model, openai_model, same, write_repository
from safetensors.torch import save_file
from torch import Tensor
from tower_samples import CLIP, make_tower, write_torch
from transformers import CLIPModel, SiglipVisionModel

from kuea_mllm.errors import OutputError, TowerError, TowerMismatch, UserError
from kuea_mllm.towers.converting import conversion
from kuea_mllm.towers.converting.conversion import Changes, Conversion, convert_tower
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file, read_directory_weights
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.formats.open_clip_repository import read_open_clip_state
from kuea_mllm.towers.model.resize import METHOD
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower
from kuea_mllm.upload_checks import check_upload

DTYPES = {
    "float32": lambda name, tensor: tensor,
    "float16": lambda name, tensor: tensor.half(),
    "bfloat16": lambda name, tensor: tensor.bfloat16(),
    # As OpenAI's own files are: norms and embeddings are wider than matrices.
    "mixed": lambda name, tensor: tensor.half() if "proj" in name or "fc" in name else tensor,
}
FORMATS = {
    "clip": ("hf", "open_clip", "openai", "visual"),
    "siglip": ("hf", "open_clip", "visual"),
}
PAIRS = [(family, *pair) for family in FORMATS for pair in permutations(FORMATS[family], 2)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Full models that text halves come from: a file of OpenAI's layout, a SigLIP repository."""
    folder = tmp_path_factory.mktemp("bases")
    write_repository(folder / "siglip", "siglip_16")
    (folder / "siglip" / "tokenizer.json").write_text("{}")
    return {
        "clip": write_torch(folder / "openai.pt", openai_model().state_dict()),
        "siglip": folder / "siglip",
    }


def source_of(base: Path, family: str, dtype: str, folder: Path) -> Path:
    """Write the vision half of a base as a state dict file, in another dtype."""
    full = read_open_clip_state(base) if family == "siglip" else read_checkpoint_file(base)
    visual = {k.removeprefix("visual."): t for k, t in full.items() if k.startswith("visual.")}
    cast = {name: DTYPES[dtype](name, tensor) for name, tensor in visual.items()}
    return write_torch(folder / "source.pt", cast)


def run(
    source: Path, place: Path, to: str, bases: Mapping[str, Path], family: str, **options: Any
) -> Path:
    """Convert into a format named as in FORMATS; return where it was written."""
    kind, _, suffix = to.partition(".")
    destination = place if kind in ("hf", "open_clip") else place.with_suffix(f".{suffix or 'pt'}")
    stated: dict[str, Any] = {}
    if source.is_file():
        stated = {"activation": "quick_gelu", "heads": 1}
        if family == "siglip":
            stated = {"activation": "gelu_pytorch_tanh", "heads": 4}
    text = bases[family] if kind in ("openai", "open_clip") else None
    convert_tower(source, destination, to=kind, text_from=text, **stated, **options)
    return destination


def stored(place: Path) -> Mapping[str, Tensor]:
    """Return every tensor that a conversion wrote, as it is on disk."""
    if place.is_file():
        return read_checkpoint_file(place)
    if (place / "open_clip_config.json").exists():
        return read_open_clip_state(place)
    return read_directory_weights(place, lambda _: True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS]
)
def test_every_pair_round_trips_bit_for_bit(
    tmp_path: Path, bases: Mapping[str, Path], family: str, first: str, second: str, dtype: str
) -> None:
    source = source_of(bases[family], family, dtype, tmp_path)
    # The comparison takes most of the time, and halves are raised to float32 for it.
    check = dtype == "mixed"
    one = run(source, tmp_path / "one", first, bases, family, check=check)
    other = run(one, tmp_path / "other", second, bases, family, check=check)
    again = run(other, tmp_path / "again", first, bases, family, check=False)
    assert same(stored(again), stored(one))
    if first == "visual":
        assert same(stored(again), stored(source))
        written = {str(t.dtype).removeprefix("torch.") for t in stored(again).values()}
        assert written == ({"float16", "float32"} if dtype == "mixed" else {dtype})


def test_wrapped_and_bare_files_convert_to_every_format(
    tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    source = source_of(bases["clip"], "clip", "float32", tmp_path)
    visual = stored(source)
    hf_file = convert.canonical_to_hf(convert.visual_to_canonical(visual))
    save_file({k: t.contiguous() for k, t in hf_file.items()}, tmp_path / "hf_file.safetensors")
    robust = write_torch(tmp_path / "robust.pt", {"vision_encoder_state_dict": dict(visual)})
    for source in (robust, tmp_path / "hf_file.safetensors"):
        for to in FORMATS["clip"]:
            folder = tmp_path / source.stem / to
            written = run(source, folder / "there", to, bases, "clip", check=to == "hf")
            back = run(written, folder / "back", "visual", bases, "clip", check=False)
            assert same(stored(back), visual)


def test_full_siglip_file_converts_to_every_format(
    tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    full = read_open_clip_state(bases["siglip"])
    source = write_torch(tmp_path / "full.pt", dict(full))
    for to in FORMATS["siglip"]:
        written = run(source, tmp_path / to / "there", to, bases, "siglip")
        back = run(written, tmp_path / to / "back", "open_clip", bases, "siglip")
        assert same(stored(back), full)
    assert SiglipVisionModel.from_pretrained(tmp_path / "hf" / "there").config.hidden_act == (
        "gelu_pytorch_tanh"
    )
    assert (tmp_path / "open_clip" / "there" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "tanh_and_eps", "siglip"])
def test_open_clip_repository_survives_a_way_through_transformers(
    tmp_path: Path, name: str
) -> None:
    model = write_repository(tmp_path / "base", name)
    (hf,) = convert_tower(tmp_path / "base", tmp_path / "hf", to="hf")
    assert hf.layout == "open_clip_directory"
    convert_tower(tmp_path / "hf", tmp_path / "back", to="open_clip", text_from=tmp_path / "base")
    assert same(read_open_clip_state(tmp_path / "back"), model.state_dict())
    assert load_tower(tmp_path / "back").spec == load_tower(tmp_path / "base").spec
    ours, theirs = (
        json.loads((tmp_path / d / "open_clip_config.json").read_text()) for d in ("back", "base")
    )
    assert ours["model_cfg"]["text_cfg"] == theirs["model_cfg"]["text_cfg"]
    record = json.loads((tmp_path / "back" / "kuea.json").read_text())
    # Where the tower came from in the first place is kept.
    assert record["base_tower"]["reference"] == str(tmp_path / "base")
    assert record["conversion"]["reference"] == str(tmp_path / "hf")
    assert record["conversion"]["parity"][0]["rows"]


def test_text_half_makes_a_full_clip_model(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    full = hf_model(hidden_act="gelu", eos_token_id=9)
    full.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    original = full.state_dict()
    source = tmp_path / "full"
    (done,) = convert_tower(source, tmp_path / "out", to="hf", text_from=source)
    assert done.parity[0].is_same
    found = CLIPModel.from_pretrained(tmp_path / "out")
    assert same(found.state_dict(), original)
    for key in ("hidden_act", "num_attention_heads", "eos_token_id"):
        assert getattr(found.config.text_config, key) == getattr(full.config.text_config, key)
    tokens = torch.tensor([[1, 5, 9, 3], [9, 2, 9, 1]])
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        one, other = (
            m.eval()(input_ids=tokens, pixel_values=pixels).logits_per_image for m in (found, full)
        )
    assert torch.equal(one, other)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(TowerError, match="no text tower goes with it"):
        convert_tower(bases["siglip"], tmp_path / "siglip", to="hf", text_from=tmp_path / "full")


def half_rounded(folder: Path) -> Path:
    save_tower(make_tower(CLIP), folder, manifest={})
    return folder


def test_dtype_only_changes_when_asked_and_its_rounding_is_reported(tmp_path: Path) -> None:
    source = half_rounded(tmp_path / "source")
    (done,) = convert_tower(source, tmp_path / "half", to="hf", changes=Changes(dtype="float16"))
    state = make_tower(CLIP).canonical_state()
    largest = max(float((t.half().float() - t).abs().max()) for t in state.values())
    change = done.changes["dtype"]
    assert change["largest_error"] == pytest.approx(largest)
    assert (change["from"], change["to"], done.dtype) == ("float32", "float16", "float16")
    assert 0 < change["embedding_relative_l2"] < 1e-2
    assert change["embedding_cosine_mean"] > 0.999
    (same_again,) = convert_tower(tmp_path / "half", tmp_path / "again", to="hf")
    assert same_again.dtype == "float16"
    assert not same_again.changes
    assert load_tower(tmp_path / "again", dtype=None).model.dtype == torch.float16
    # Up again is exact, and said to be.
    (wide,) = convert_tower(
        tmp_path / "half", tmp_path / "wide", to="hf", changes=Changes(dtype="float32")
    )
    assert wide.changes["dtype"]["largest_error"] == 0
    assert wide.fingerprint == done.fingerprint


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    with torch.no_grad():
        tower.model.get_parameter("visual_projection.weight")[0, 0] = 1e6
    save_tower(tower, tmp_path / "source", manifest={})
    with pytest.raises(TowerMismatch, match=r"visual_projection\.weight has values that float16"):
        convert_tower(
            tmp_path / "source", tmp_path / "out", to="hf", changes=Changes(dtype="float16")
        )
    assert not (tmp_path / "out").exists()


def test_image_size_changes_only_when_asked_and_is_measured(tmp_path: Path) -> None:
    source = half_rounded(tmp_path / "source")
    assert load_tower(source).spec.image_size == 16
    assert load_tower(source, image_size=32).spec.image_size == 32
    (done,) = convert_tower(source, tmp_path / "out", to="hf", changes=Changes(image_size=32))
    change = done.changes["image_size"]
    assert (change["from"], change["to"], change["position_embeddings"]) == (16, 32, METHOD)
    assert 0 < change["embedding_relative_l2"] < 2
    assert [report.first for report in done.parity] == [
        "source in transformers",
        "tower as changed in transformers",
    ]
    resized = load_tower(tmp_path / "out")
    assert same(resized.canonical_state(), load_tower(source, image_size=32).canonical_state())
    assert json.loads((tmp_path / "out" / "kuea.json").read_text())["conversion"]["changes"]
    (kept,) = convert_tower(source, tmp_path / "same", to="hf", changes=Changes(image_size=16))
    assert not kept.changes


def test_size_with_a_rest_is_not_lost_unsaid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As SigLIP at 384 pixels with patches of 14: weights do not tell it from 378."""
    write_repository(tmp_path / "base", "siglip")
    convert_tower(tmp_path / "base", tmp_path / "out.pt", to="visual")
    assert "takes 20 pixels, which no state dict states: readers will take 16" in caplog.text
    stated: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "heads": 4}
    assert load_tower(tmp_path / "out.pt", **stated).spec.image_size == 16
    again = load_tower(tmp_path / "out.pt", image_size=20, **stated)
    assert again.spec == load_tower(tmp_path / "base").spec
    assert same(again.canonical_state(), load_tower(tmp_path / "base").canonical_state())
    for size, name in ((None, "vit_sample_siglip_16"), (20, "vit_sample_siglip")):
        (done,) = convert_tower(
            tmp_path / "out.pt",
            tmp_path / f"repository-{name}",
            to="open_clip",
            text_from=tmp_path / "base",
            changes=Changes(image_size=size),
            **stated,
        )
        if size is not None:
            kept = done.changes["image_size"]["position_embeddings"]
            assert kept.startswith("kept as they are")
        config = json.loads((done.destination / "open_clip_config.json").read_text())
        assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == name


def test_mixes_are_written_side_by_side(tmp_path: Path) -> None:
    original, tuned = make_tower(CLIP, seed=0), make_tower(CLIP, seed=1)
    save_tower(original, tmp_path / "original", manifest={})
    save_tower(tuned, tmp_path / "tuned", manifest={})
    changes = Changes(original=str(tmp_path / "original"))
    weights = [0.0, 0.25, 1.0]
    done = convert_tower(
        tmp_path / "tuned", tmp_path / "out", to="hf", changes=changes, weights=weights
    )
    assert [one.destination.name for one in done] == ["0", "0.25", "1"]
    assert done[0].fingerprint == original.fingerprint
    assert done[2].fingerprint == tuned.fingerprint
    ours = load_tower(tmp_path / "out" / "0.25").canonical_state()
    one, other = original.canonical_state(), tuned.canonical_state()
    assert all(torch.equal(ours[k], 0.25 * other[k] + 0.75 * one[k]) for k in ours)
    assert done[1].changes["interpolate"]["weight"] == 0.25
    visual = convert_tower(
        tmp_path / "tuned", tmp_path / "files", to="visual", changes=changes, weights=[0.5]
    )
    assert visual[0].destination == tmp_path / "files" / "0.5" / "tower.safetensors"
    assert visual[0].destination.is_file()


def test_towers_that_do_not_mix_are_refused(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP), tmp_path / "tuned", manifest={})
    save_tower(make_tower(replace(CLIP, activation="gelu")), tmp_path / "gelu", manifest={})
    with pytest.raises(TowerMismatch, match="differ in activation gelu and quick_gelu"):
        convert_tower(
            tmp_path / "tuned",
            tmp_path / "out",
            to="hf",
            changes=Changes(original=str(tmp_path / "gelu"), weight=0.5),
        )
    for changes, weights, pattern in (
        (Changes(weight=0.5), None, "only one was given"),
        (Changes(original="x", weight=1.5), None, "no number from 0 to 1"),
        (Changes(original="x"), [0.5, 0.5], "names a weight twice"),
    ):
        with pytest.raises(UserError, match=pattern):
            convert_tower(
                tmp_path / "tuned", tmp_path / "out", to="hf", changes=changes, weights=weights
            )
    assert not (tmp_path / "out").exists()


def test_manifest_of_a_source_is_carried_on(tmp_path: Path) -> None:
    made = {"objective": {"kernel": "polynomial"}, "base_tower": {"reference": "openai/clip"}}
    save_tower(make_tower(CLIP), tmp_path / "tuned", manifest={**made, "command": "old"})
    convert_tower(tmp_path / "tuned", tmp_path / "out", to="hf", command="new")
    record = json.loads((tmp_path / "out" / "kuea.json").read_text())
    assert {key: record[key] for key in made} == made
    assert record["command"] == "new"
    assert record["fingerprint"] == make_tower(CLIP).fingerprint
    assert record["conversion"]["parity"][0]["bound"] == 1e-4


@pytest.mark.parametrize("to", ["hf", "open_clip", "openai", "visual"])
def test_what_does_not_compute_the_same_gets_no_name(
    tmp_path: Path, bases: Mapping[str, Path], to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion with a mistake in it: one tensor is written a little wrong."""
    source = source_of(bases["clip"], "clip", "float32", tmp_path)
    before = sorted(tmp_path.iterdir())
    honest = conversion._writer

    def careless(*arguments: Any) -> Any:
        write = honest(*arguments)

        def wrong(tower: Any, path: Path, manifest: dict[str, Any]) -> None:
            state = tower.canonical_state()
            name = "encoder.layers.1.mlp.fc2.weight"
            state[name] = state[name] * 1.01
            spoilt = make_tower(tower.spec)
            spoilt.model.load_state_dict(convert.canonical_to_hf(state))
            write(spoilt, path, manifest)

        return wrong

    monkeypatch.setattr(conversion, "_writer", careless)
    with pytest.raises(TowerError, match="do not compute the same"):
        run(source, tmp_path / "out", to, bases, "clip")
    assert sorted(tmp_path.iterdir()) == before
    assert run(source, tmp_path / "out", to, bases, "clip", check=False).exists()


@pytest.mark.parametrize("to", [*FORMATS["clip"], "visual.safetensors", "openai.safetensors"])
def test_what_is_written_has_the_permissions_of_any_new_file(
    tmp_path: Path, bases: Mapping[str, Path], to: str
) -> None:
    source = source_of(bases["clip"], "clip", "float32", tmp_path)
    before = os.umask(0o027)
    try:
        written = run(source, tmp_path / "out", to, bases, "clip", check=False)
    finally:
        os.umask(before)
    files = [path for path in (written, *written.rglob("*")) if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert written.is_file() or written.stat().st_mode & 0o777 == 0o750


def test_an_open_clip_repository_has_a_card_and_can_be_shared(
    tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    source = source_of(bases["clip"], "clip", "float32", tmp_path)
    written = run(source, tmp_path / "out", "open_clip", bases, "clip")
    card = (written / "README.md").read_text()
    assert 'library_name: "open_clip"' in card
    assert "create_model_from_pretrained" in card
    assert "from transformers" not in card
    upload = check_upload(written, base_model="openai/clip-vit-large-patch14")
    assert {"README.md", "open_clip_model.safetensors", "kuea.json"} <= upload.files.keys()


def test_a_name_without_suffix_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name in ("out", "out.bin"):
        with pytest.raises(OutputError, match=r"ends in no suffix") as caught:
            convert_tower(tmp_path / "absent.pt", tmp_path / name, to="visual")
        assert ".safetensors" in caught.value.remedy


def test_impossible_requests_are_one_line(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    source = source_of(bases["clip"], "clip", "float32", tmp_path)
    stated: dict[str, Any] = {"activation": "quick_gelu", "heads": 1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "onnx"}, "no format 'onnx'"),
        ({"to": "open_clip"}, "needs --text-from"),
        ({"to": "openai"}, "needs --text-from"),
        ({"to": "visual", "text_from": bases["clip"]}, "holds no text tower"),
        ({"to": "hf", "changes": Changes(dtype="int8")}, "no dtype 'int8'"),
        ({"to": "hf", "changes": Changes(image_size=28)}, "no multiple of the patch size"),
        ({"to": "openai", "text_from": bases["siglip"]}, "is a SigLIP"),
        ({"to": "open_clip", "text_from": bases["siglip"]}, "in 24 numbers"),
    ]
    for options, pattern in cases:
        with pytest.raises(UserError, match=pattern):
            convert_tower(source, tmp_path / "out.pt", **options, **stated)
    (tmp_path / "there.pt").touch()
    with pytest.raises(OutputError, match="exists already"):
        convert_tower(source, tmp_path / "there.pt", to="visual", **stated)
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt", "there.pt"}


def test_open_clip_repository_needs_a_timm_model_for_siglip(
    tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    source = source_of(bases["siglip"], "siglip", "float32", tmp_path)
    # The same sizes with another activation would be another model in open_clip.
    with pytest.raises(TowerError, match=r"activation gelu, .*no SigLIP of timm") as caught:
        convert_tower(
            source,
            tmp_path / "out",
            to="open_clip",
            text_from=bases["siglip"],
            activation="gelu",
            heads=4,
        )
    same_shapes = "vit_sample_siglip_16 (16 pixels, 4 heads, activation gelu_pytorch_tanh"
    assert same_shapes in caught.value.problem
    with pytest.raises(TowerError, match="whole repository"):
        full = write_torch(tmp_path / "f.pt", dict(read_open_clip_state(bases["siglip"])))
        convert_tower(full, tmp_path / "out", to="open_clip", text_from=full, heads=4)


def test_activation_of_both_halves_must_agree_for_open_clip(tmp_path: Path) -> None:
    write_repository(tmp_path / "gelu", "gelu")
    spec = replace(CLIP, mlp_width=256)
    save_tower(make_tower(spec), tmp_path / "quick", manifest={})
    with pytest.raises(TowerError, match="one switch for both"):
        convert_tower(
            tmp_path / "quick", tmp_path / "out", to="open_clip", text_from=tmp_path / "gelu"
        )


def test_unnamed_activation_of_a_full_file_holds_for_both_halves(tmp_path: Path) -> None:
    """A GELU model as a bare state dict: what the user states is true of the whole file."""
    model = openai_model(quick_gelu=False)
    source = write_torch(tmp_path / "gelu.pt", model.state_dict())
    (done,) = convert_tower(
        source, tmp_path / "out", to="open_clip", text_from=source, activation="gelu"
    )
    assert done.parity[0].is_same
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is False


def test_conversion_is_plain_json(tmp_path: Path) -> None:
    source = half_rounded(tmp_path / "source")
    (done,) = convert_tower(source, tmp_path / "out.safetensors", to="visual")
    assert isinstance(done, Conversion)
    record = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert record["destination"] == str(tmp_path / "out.safetensors")
    assert {row["quantity"] for row in record["parity"][0]["rows"]} == {
        "embedding",
        "penultimate patch tokens",
        "last patch tokens",
    }
