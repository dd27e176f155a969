"""Parts that fit by their sizes and are the wrong ones; the card of what an import makes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_flamingo import RELEASED_HEADS, save_tiny_base
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from kuea_mllm.adapters.openflamingo import release_checks
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.convert import import_released
from kuea_mllm.errors import UserError
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, TowerSpec
from kuea_mllm.upload_checks import check_upload

TABLE = "transformer.wte.weight"
# The tiny tokenizer spells bytes: 256 of them and two tokens, then those of OpenFlamingo.
ROWS = 258
INSTRUCT = "models--anas-awadalla--mpt-1b-redpajama-200b-dolly"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a release: checkpoint, language model and tower that belong together."""
    folder = tmp_path_factory.mktemp("release")
    base = save_tiny_base(folder / "base", **RELEASED_HEADS)
    OpenFlamingoAdapter().export_released(base, folder / "release")
    return folder / "release"


def language_model(release: Path, directory: Path, table: Tensor) -> Path:
    """Write the language model of a release with another embedding."""
    shutil.copytree(release / "language_model", directory)
    state = load_file(directory / "model.safetensors")
    save_file(state | {TABLE: table}, directory / "model.safetensors")
    return directory


def own_table(release: Path) -> Tensor:
    return load_file(release / "language_model" / "model.safetensors")[TABLE]


def convert(release: Path, out: Path, **changes: Any) -> Path:
    parts = {"language_model": release / "language_model", "tower": release / "vision_tower"}
    import_released(release / "checkpoint.pt", destination=out, **(parts | changes))
    return out


def test_language_model_of_the_same_sizes_is_refused(release: Path, tmp_path: Path) -> None:
    table = own_table(release)
    assert len(table) == ROWS + 3
    table[[7, 100, ROWS - 1]] += torch.tensor([0.25, -0.5, 0.125])[:, None]
    other = language_model(release, tmp_path / "lm", table)
    with pytest.raises(UserError) as refusal:
        convert(release, tmp_path / "hf", language_model=other)
    assert re.search(
        rf"{other} is not the language model .* 3 of the first {ROWS} rows of {TABLE} differ, "
        r"by up to 0\.5;",
        str(refusal.value),
    )
    assert "its Instruct variant to anas-awadalla/mpt-1b-redpajama-200b-dolly" in str(refusal.value)
    assert "probably" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("folder", "meant"),
    [(INSTRUCT, "200b is probably"), (INSTRUCT.removesuffix("-dolly"), "200b-dolly is probably")],
)
def test_refusal_tells_which_language_model_is_meant(
    folder: str, meant: str, release: Path, tmp_path: Path
) -> None:
    other = language_model(release, tmp_path / folder, torch.zeros_like(own_table(release)))
    with pytest.raises(UserError, match=meant):
        convert(release, tmp_path / "hf", language_model=other)


def test_rows_of_added_tokens_and_padding_may_differ(release: Path, tmp_path: Path) -> None:
    table = own_table(release)
    padded = torch.cat([table[:ROWS], torch.randn(62, table.shape[1])])
    same = language_model(release, tmp_path / "lm", padded)
    out = convert(release, tmp_path / "hf", language_model=same)
    assert json.loads((out / "kuea.json").read_text())["imported"]["accepted_differences"] == []


def test_embeddings_of_two_dtypes_are_compared_in_the_narrower(
    release: Path, tmp_path: Path
) -> None:
    half = own_table(release).bfloat16()
    convert(release, tmp_path / "hf", language_model=language_model(release, tmp_path / "lm", half))
    half[3, 3] *= 1.01
    other = language_model(release, tmp_path / "other", half)
    with pytest.raises(UserError, match=f"1 of the first {ROWS} rows"):
        convert(release, tmp_path / "no", language_model=other)


def test_embedding_with_fewer_rows_than_the_tokenizer_is_refused(
    release: Path, tmp_path: Path
) -> None:
    other = language_model(release, tmp_path / "lm", own_table(release)[:200].clone())
    with pytest.raises(UserError, match=f"has 200 rows, the checkpoint's tokenizer {ROWS} before"):
        convert(release, tmp_path / "hf", language_model=other)


def test_other_embedding_is_taken_where_it_is_accepted(release: Path, tmp_path: Path) -> None:
    other = language_model(release, tmp_path / "lm", torch.zeros_like(own_table(release)))
    OpenFlamingoAdapter().import_parts(
        release,
        tmp_path / "hf",
        language_model=other,
        tokenizer=None,
        tower=None,
        activation=None,
        heads=None,
        command=None,
        accept=["embedding"],
    )
    record = json.loads((tmp_path / "hf" / "kuea.json").read_text())
    assert record["imported"]["accepted_differences"] == ["embedding"]
    with pytest.raises(UserError, match="'everything' is nothing that can be accepted"):
        convert(release, tmp_path / "no", accept=["everything"])


def test_tower_built_differently_is_refused_or_accepted(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_with = {"image_size": 16, "patch_size": 8, "layers": 2, "activation": "quick_gelu"}
    monkeypatch.setitem(release_checks.RELEASED_TOWERS, 32, trained_with)
    convert(release, tmp_path / "same")
    config = CLIPVisionConfig.from_pretrained(release / "vision_tower")
    config.image_size, config.hidden_act = 24, "gelu"
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    given = {"tower": tmp_path / "tower"}
    expected = f"tower {tmp_path / 'tower'} .*image_size is 24, not 16; activation is gelu, not q"
    with pytest.raises(UserError, match=expected):
        convert(release, tmp_path / "hf", **given)
    convert(release, tmp_path / "hf", **given, accept=["tower"])


def released_tower(**changes: Any) -> TowerSpec:
    settings: dict[str, Any] = {
        "family": "clip",
        "image_size": 224,
        "patch_size": 14,
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_width": 4096,
        "embedding_width": 768,
        "activation": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "resize": "shortest_edge",
    }
    return TowerSpec(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 336}, "image_size is 336, not 224"),
        ({"activation": "gelu"}, "activation is gelu, not quick_gelu"),
        ({"patch_size": 16}, "patch_size is 16, not 14"),
        ({"heads": 8}, "heads is 8, not 16"),
        ({"layers": 23}, "layers is 23, not 24"),
    ],
)
def test_released_checkpoints_take_towers_like_their_own(
    changes: dict[str, Any], message: str
) -> None:
    release_checks.check_tower(released_tower(), width=1024, source="a")
    with pytest.raises(UserError, match=message):
        release_checks.check_tower(released_tower(**changes), width=1024, source="a")


def test_import_writes_a_card_that_can_be_pushed(release: Path, tmp_path: Path) -> None:
    place = tmp_path / "models--openflamingo--OpenFlamingo-3B-vitl-mpt1b" / "snapshots" / "1"
    shutil.copytree(release, place)
    (place / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# OpenFlamingo\n")
    out = convert(place, tmp_path / "hf")
    card = (out / "README.md").read_text()
    assert "# openflamingo/OpenFlamingo-3B-vitl-mpt1b in Hugging Face form" in card
    assert 'license: "mit"' in card
    assert "All weights keep their values and dtype" in card
    assert str(tmp_path) not in card
    upload = check_upload(out)
    assert upload.kind == "mllm"
    # The lines of code in it name classes that exist.
    code = re.findall(r"^from (\S+) import (\w+)$", card, re.M)
    assert [name for _, name in code] == [
        "OpenFlamingoForConditionalGeneration",
        "OpenFlamingoProcessor",
    ]
    for module, name in code:
        assert hasattr(importlib.import_module(module), name)
        assert f'{name}.from_pretrained("' in card


def test_card_of_a_local_release_needs_its_base_to_be_pushed(release: Path, tmp_path: Path) -> None:
    out = convert(release, tmp_path / "hf")
    assert "# OpenFlamingo in Hugging Face form" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="does not state base_model"):
        check_upload(out)
    check_upload(out, base_model="openflamingo/OpenFlamingo-3B-vitl-mpt1b")
