"""The tokenizer of a converted LLaVA against the original code's token ids."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kuea_mllm.adapters.llava.original_tokenizer import write_tokenizer
from kuea_mllm.adapters.llava.prompt import SYSTEM
from kuea_mllm.adapters.llava.sentencepiece_model import merges_of, read_pieces
from kuea_mllm.errors import UserError

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
MODES = ["legacy", "nonlegacy"]
# What a directory in the original layout may hold.
FORMS = {
    "all files": (),
    "only tokenizer.model": ("tokenizer.json",),
    "only tokenizer.json": ("tokenizer.model",),
}


def source_of(mode: str, left_out: tuple[str, ...], out: Path) -> Path:
    out.mkdir()
    for path in (GOLDEN / f"tokenizer_{mode}").iterdir():
        if path.name not in left_out:
            shutil.copy(path, out)
    return out


def tokenized(text: str, tokenizer: Any) -> list[int]:
    """The ids of a whole conversation: piece by piece around pictures, as in training."""
    ids: list[int] = [tokenizer.bos_token_id]
    for number, piece in enumerate(text.split("<image>")):
        ids += [-200] if number else []
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_ids_stay_those_of_the_original(mode: str, form: str, tmp_path: Path) -> None:
    source = source_of(mode, FORMS[form], tmp_path / "source")
    (tmp_path / "out").mkdir()
    ids = write_tokenizer(source, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = json.loads((GOLDEN / "preprocess" / f"expected_{mode}.json").read_text())
    checked = 0
    for sample in (sample for samples in expected.values() for sample in samples):
        if "prompt" not in sample:
            continue
        found = tokenized(sample["prompt"], tokenizer)
        # The shorter list of a text-only sample is cut.
        length = min(len(found), len(sample["input_ids"]))
        assert found[:length] == sample["input_ids"][:length], sample["id"]
        assert sample["input_ids"] == found or not sample["has_image"], sample["id"]
        checked += 1
    assert checked > 5
    known = len(
        json.loads((GOLDEN / f"tokenizer_{mode}" / "tokenizer.json").read_text())["model"]["vocab"]
    )
    assert (ids.known, ids.image, ids.pad) == (known, known, known + 1)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("<image><pad>", add_special_tokens=False)["input_ids"] == [known, known + 1]


def test_saving_again_is_what_loses_the_mode(tmp_path: Path) -> None:
    """Why the files are not written by `save_pretrained` alone."""
    text = f"{SYSTEM} USER: one ASSISTANT: two</s>USER: three"
    before: Any = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_legacy")
    (tmp_path / "ours").mkdir()
    write_tokenizer(GOLDEN / "tokenizer_legacy", tmp_path / "ours")
    ours: Any = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert ours(text)["input_ids"] == before(text)["input_ids"]
    before.save_pretrained(tmp_path / "plain")
    plain: Any = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert plain(text)["input_ids"] != before(text)["input_ids"]


def test_missing_mode_means_legacy(tmp_path: Path) -> None:
    source = source_of("legacy", (), tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["legacy"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["legacy"] is True


def test_tokens_behind_the_vocabulary_are_kept(tmp_path: Path) -> None:
    source = source_of("nonlegacy", ("tokenizer.json",), tmp_path / "source")
    known = len(read_pieces(source / "tokenizer.model"))
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": known, "<extra>": known + 1}))
    (tmp_path / "out").mkdir()
    ids = write_tokenizer(source, tmp_path / "out")
    assert (ids.known, ids.pad, ids.image) == (known + 2, known, known + 2)
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": known + 3}))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="which leave gaps"):
        write_tokenizer(source, tmp_path / "other")


@pytest.mark.parametrize("mode", MODES)
def test_sentencepiece_model_is_read_as_transformers_does(mode: str) -> None:
    folder = GOLDEN / f"tokenizer_{mode}"
    pieces = read_pieces(folder / "tokenizer.model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert {piece.text: index for index, piece in enumerate(pieces)} == model["vocab"]
    assert [list(merge) for merge in merges_of(pieces)] == model["merges"]


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    content = (GOLDEN / "tokenizer_legacy" / "tokenizer.model").read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.model is no SentencePiece model"):
        read_pieces(path)
    path.write_bytes(b"\x0a\x05\x0a\x03abc")
    with pytest.raises(UserError, match="no tokenizer of Llama's kind"):
        read_pieces(path)
