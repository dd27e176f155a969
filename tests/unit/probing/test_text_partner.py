"""A tower finds the text tower it belongs to, in every format, or says that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from probe_data import CONFIG, clip_model, model_settings, write_clip
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.manifest import named_source
from kuea_mllm.probing.partner import load_partner
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.reading.text_tower import _First, load_text_tower
from kuea_mllm.towers.writing.save import save_tower

TEXTS = ["a photo of a dog.", "", "two cats " * 60]
WORDS = ["<pad>", "<s>", "a", "photo", "of", "cat", "dog", "</s>"]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": len(WORDS),
}
SIZES = {"num_attention_heads": 2, "max_position_embeddings": 12}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    write_clip(place)
    return place


def expected_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        embedded: torch.Tensor = model.encode_text(open_clip.SimpleTokenizer()(TEXTS))
    return embedded


def write_tokenizer(directory: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("<s>", 1), ("</s>", 7)]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[0], eos_token=WORDS[-1]
    ).save_pretrained(directory)


def test_open_clip_repository_brings_its_own_text_tower(directory: Path) -> None:
    partner = load_partner(load_tower(directory))
    assert partner.found_by == "the tower's own weights"
    assert torch.allclose(partner.encode(TEXTS), expected_of(clip_model()), atol=1e-5)


@pytest.mark.parametrize("kind", ["open_clip", "openai"])
def test_causal_text_tower_sees_no_padding(kind: str, tmp_path: Path) -> None:
    settings = model_settings()
    settings["text_cfg"] |= {"width": 64, "heads": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings).eval()
    path = tmp_path / "clip.pt"
    if kind == "open_clip":
        write_clip(tmp_path / "clip")
        path, model = tmp_path / "clip", clip_model()
    else:
        torch.save(model.state_dict(), path)
    text = load_text_tower(path)
    shapes: list[tuple[int, ...]] = []
    module: Any = text._module
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    short = [f"{word} {number}" for number in range(10, 100) for word in ("dog", "cat", "a cow")]
    texts = [*short, *short, *TEXTS]
    embedded = text.encode(texts)
    assert [shape[0] for shape in shapes] == [256, len(set(texts)) - 256]
    assert (shapes[0][1] < 8, shapes[1][1]) == (True, 77)
    assert torch.allclose(embedded[-3:], text.encode(TEXTS), atol=1e-6)
    assert torch.allclose(embedded[2], text.encode([short[2]])[0], atol=1e-6)
    # A tie of equal captions stays one.
    assert torch.equal(embedded[: len(short)], embedded[len(short) : 2 * len(short)])
    assert torch.allclose(embedded[-3:], expected_of(model), atol=1e-5)


def test_text_tower_with_a_class_token_is_read_whole() -> None:
    torch.manual_seed(0)
    model = open_clip.transformer.TextTransformer(
        vocab_size=16, width=16, heads=2, layers=1, output_dim=8, embed_cls=True
    )
    whole: Any = _First(model)
    assert whole.read_at is None
    tokens = torch.randint(0, 16, (2, 77))
    assert torch.equal(whole(tokens), model(tokens))


def test_openai_file_embeds_texts_as_open_clip_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = model_settings()
    settings["text_cfg"] |= {"width": 64, "heads": 1}  # as the format implies
    model = open_clip.CLIP(**settings).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    text = load_text_tower(tmp_path / "clip.pt")
    assert torch.allclose(text.encode(TEXTS), expected_of(model), atol=1e-5)


def test_activation_of_a_file_is_that_of_its_tower(tmp_path: Path) -> None:
    settings = model_settings()
    settings["text_cfg"] |= {"width": 64, "heads": 1}
    settings["vision_cfg"] |= {"width": 64, "head_width": 64}
    torch.manual_seed(0)
    model = open_clip.CLIP(**(settings | {"quick_gelu": False})).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    right = load_partner(load_tower(tmp_path / "clip.pt", activation="gelu"))
    assert torch.allclose(right.encode(TEXTS), expected_of(model), atol=1e-5)
    wrong = load_partner(load_tower(tmp_path / "clip.pt", activation="quick_gelu"))
    assert not torch.allclose(wrong.encode(TEXTS), expected_of(model), atol=1e-4)
    assert wrong.fingerprint != right.fingerprint


def test_hugging_face_clip_uses_its_own_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, **SIZES, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 24}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    partner = load_partner(load_tower(tmp_path))
    ids = torch.tensor([[1, 2, 6, 7] + [0] * 8, [1, 3, 7] + [0] * 9])
    with torch.no_grad():
        expected: Any = model.get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
    assert torch.allclose(partner.encode(["a dog", "photo"]), expected, atol=1e-6)


def test_hugging_face_siglip_is_read_at_full_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, **SIZES, "projection_size": 64}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    found = load_text_tower(tmp_path)
    ids = torch.tensor([[1, 2, 6, 7] + [0] * 8])
    with torch.no_grad():
        expected = model.text_model(input_ids=ids).pooler_output
    assert torch.allclose(found.encode(["a dog"]), expected, atol=1e-6)


def test_another_tokenizer_is_another_text_tower(tmp_path: Path) -> None:
    CLIPModel(CLIPConfig(text_config={**TEXT, **SIZES}, vision_config=VISION)).save_pretrained(
        tmp_path
    )
    write_tokenizer(tmp_path)
    before = load_text_tower(tmp_path).fingerprint
    assert load_text_tower(tmp_path).fingerprint == before
    file = tmp_path / "tokenizer.json"
    # Cached class vectors of the old tokens would be those of other texts.
    file.write_text(file.read_text().replace('"cat": 5', '"cow": 5'))
    assert load_text_tower(tmp_path).fingerprint != before


def test_text_tower_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    text = {**TEXT, **SIZES, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 24}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    ).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="has no tokenizer: no tokenizer file lies beside"):
        load_text_tower(tmp_path)


def test_aligned_tower_finds_its_clip_by_its_record(directory: Path, tmp_path: Path) -> None:
    base = {"reference": str(directory), "revision": None}
    save_tower(load_tower(directory), tmp_path / "aligned", manifest={"base_tower": base})
    again = {"reference": str(tmp_path / "aligned")}
    save_tower(load_tower(tmp_path / "aligned"), tmp_path / "twice", manifest={"base_tower": again})
    expected = load_partner(load_tower(directory)).fingerprint
    for name in ("aligned", "twice"):
        partner = load_partner(load_tower(tmp_path / name))
        assert (partner.found_by, partner.source) == ("kuea.json", str(directory))
        assert partner.fingerprint == expected


def test_clip_that_was_named_by_a_relative_path_is_found_from_another_folder(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    start = named_source(directory.name)
    save_tower(load_tower(directory), tmp_path / "aligned", manifest={"base_tower": start})
    again = named_source(str(tmp_path / "aligned"))
    save_tower(load_tower(tmp_path / "aligned"), tmp_path / "twice", manifest={"base_tower": again})
    monkeypatch.chdir("/")
    for name in ("aligned", "twice"):
        assert load_partner(load_tower(tmp_path / name)).source == str(directory)


def test_another_clip_in_the_place_of_the_recorded_one_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    tower = load_tower(tmp_path / "clip")
    base = {"reference": str(tmp_path / "clip"), "fingerprint": tower.fingerprint}
    save_tower(tower, tmp_path / "aligned", manifest={"base_tower": base})
    aligned = load_tower(tmp_path / "aligned")
    assert load_partner(aligned).found_by == "kuea.json"
    write_clip(tmp_path / "clip", seed=1)
    with pytest.raises(TowerMismatch, match=r"clip is not the CLIP that \S+aligned was made from"):
        load_partner(aligned)
    assert load_partner(aligned, str(tmp_path / "clip")).found_by == "--base"


def test_recorded_state_dict_is_checked_with_the_activation_of_its_tower(tmp_path: Path) -> None:
    settings = model_settings()
    settings["text_cfg"] |= {"width": 64, "heads": 1}
    settings["vision_cfg"] |= {"width": 64, "head_width": 64}
    model = open_clip.CLIP(**(settings | {"quick_gelu": False})).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tower = load_tower(tmp_path / "clip.pt", activation="gelu")
    base = {"reference": str(tmp_path / "clip.pt"), "fingerprint": tower.fingerprint}
    save_tower(tower, tmp_path / "aligned", manifest={"base_tower": base})
    found = load_partner(load_tower(tmp_path / "aligned"))
    assert torch.allclose(found.encode(TEXTS), expected_of(model), atol=1e-5)


def test_tower_without_a_text_partner_is_refused(directory: Path, tmp_path: Path) -> None:
    save_tower(load_tower(directory), tmp_path / "alone", manifest={})
    with pytest.raises(TowerError, match=r"has no text tower, and no kuea\.json names") as caught:
        load_partner(load_tower(tmp_path / "alone"))
    assert "--base" in caught.value.remedy
    assert load_partner(load_tower(tmp_path / "alone"), str(directory)).found_by == "--base"
    with pytest.raises(TowerError, match=r"--base \S+alone has no text tower"):
        load_partner(load_tower(directory), str(tmp_path / "alone"))


def test_base_that_is_gone_is_named(directory: Path, tmp_path: Path) -> None:
    base = {"reference": "/nowhere/clip"}
    save_tower(load_tower(directory), tmp_path / "aligned", manifest={"base_tower": base})
    with pytest.raises(TowerError, match=r"/nowhere/clip, which its kuea\.json says"):
        load_partner(load_tower(tmp_path / "aligned"))


def test_text_tower_of_another_width_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "wide"
    settings = json.loads(json.dumps(CONFIG))
    settings["model_cfg"]["embed_dim"] = 8
    other.mkdir()
    torch.save(
        open_clip.CLIP(**settings["model_cfg"]).state_dict(),
        other / "open_clip_pytorch_model.bin",
    )
    (other / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(TowerMismatch, match=r"embeds images in 16 numbers.*texts in 8"):
        load_partner(load_tower(directory), str(other))
