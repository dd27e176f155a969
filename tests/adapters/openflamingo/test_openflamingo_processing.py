"""The OpenFlamingo processor beyond its goldens: counts, refusals, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_flamingo import SIDE, tiny_processor, tiny_tokenizer
from transformers import AutoProcessor, AutoTokenizer

from kuea_mllm.adapters.openflamingo.processing import (
    OpenFlamingoImageProcessor,
    OpenFlamingoProcessor,
    add_special_tokens,
    clean_up,
)
from kuea_mllm.errors import DataError, UserError

RED, BLUE = (Image.new("RGB", (40, 24), colour) for colour in ("red", "blue"))


def test_new_tokens_follow_the_old_ones_in_the_order_of_the_checkpoint() -> None:
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    # What transformers 5 sets by itself.
    assert str(tokenizer.pad_token) == "<|padding|>"
    add_special_tokens(tokenizer)
    names = ["<|endofchunk|>", "<image>", "<PAD>"]
    assert tokenizer.convert_tokens_to_ids(names) == [before, before + 1, before + 2]
    assert tokenizer.pad_token_id == before + 2
    assert len(tokenizer) == before + 3
    add_special_tokens(tokenizer)
    assert len(tokenizer) == before + 3


def test_processor_saves_and_loads_the_same(tmp_path: Path) -> None:
    processor = tiny_processor()
    processor.save_pretrained(tmp_path)
    loaded = OpenFlamingoProcessor.from_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), OpenFlamingoProcessor)
    assert isinstance(loaded.image_processor, OpenFlamingoImageProcessor)
    text, images = ["<image>a b", "longer <image>c<|endofchunk|>"], [[RED], [BLUE]]
    expected, found = processor(text=text, images=images), loaded(text=text, images=images)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


def test_rows_are_padded_on_the_left_and_missing_images_are_zero() -> None:
    processor = tiny_processor()
    batch = processor(text=["<image>ab<image>", "cde", "<image>"], images=[[RED, BLUE], [], [RED]])
    pad = processor.tokenizer.pad_token_id
    assert batch["attention_mask"].tolist() == [
        [True] * 4, [False] + [True] * 3, [False] * 3 + [True]
    ]  # fmt: skip
    assert (batch["input_ids"] == pad).tolist() == (~batch["attention_mask"]).tolist()
    assert batch["pixel_values"].shape == (3, 2, 3, SIDE, SIDE)
    assert not batch["pixel_values"][1].any() and not batch["pixel_values"][2, 1].any()
    assert torch.equal(batch["pixel_values"][0, 0], batch["pixel_values"][2, 0])


def test_one_prompt_takes_a_flat_list_of_images() -> None:
    processor = tiny_processor()
    nested = processor(text=["<image><image>a"], images=[[RED, BLUE]])
    flat = processor(text="<image><image>a", images=[RED, BLUE])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert "pixel_values" not in processor(text="no image")


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (["a", "<image><image>b"], [[], [RED]], "prompt 1 holds 2 <image> tokens .* with 1 image"),
        (["<image>a"], [[RED, BLUE]], "prompt 0 holds 1 <image> tokens and comes with 2 images"),
        (["<image>a"], None, "prompt 0 holds 1 <image> tokens and comes with 0 images"),
        (["a", "b"], [[]], "2 prompts and 1 lists of images"),
    ],
)
def test_images_and_places_for_them_have_to_match(text: Any, images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_processor()(text=text, images=images)


def test_other_frameworks_are_refused() -> None:
    assert tiny_processor()(text="a", return_tensors="pt")["input_ids"].shape == (1, 1)
    with pytest.raises(UserError, match="return_tensors is 'np'"):
        tiny_processor()(text="a", return_tensors="np")


def test_too_long_a_prompt_is_refused_by_number_and_length() -> None:
    with pytest.raises(UserError, match="prompt 1 has 9 tokens, more than the 8"):
        tiny_processor()(text=["short", "ninebytes"], max_length=8)
    assert tiny_processor()(text=["ninebytes"], max_length=9)["input_ids"].shape == (1, 9)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 3 * SIDE), (5, 3), (200, 7)])
def test_every_shape_becomes_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "green")
    pixels = OpenFlamingoImageProcessor(image_size=SIDE)(image)["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert torch.allclose(pixels, pixels[:, :, :1, :1])


def test_palette_with_transparency_raises_no_warning() -> None:
    image = RED.convert("P")
    image.info["transparency"] = bytes(range(256))
    pixels = OpenFlamingoImageProcessor(image_size=SIDE)([image, RED])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])


def test_damaged_image_is_refused_by_name(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "noise.png")
    content = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(DataError, match=r"cut\.png"):
        OpenFlamingoImageProcessor(image_size=SIDE)(image)


def test_decoded_text_is_cleaned_of_blanks_before_marks() -> None:
    assert clean_up("a cat , is n't it ? I 'm ' here ' . he 's ! we 've you 're") == (
        "a cat, isn't it? I'm'here '. he's! we've you're"
    )
    processor = tiny_processor()
    ids = processor(text=["prompt", "hm"])["input_ids"]
    new = processor.tokenizer("yes , no")["input_ids"] + [processor.endofchunk_token_id] * 2
    sequences = torch.cat([ids, torch.tensor(new).expand(2, -1)], dim=1)
    assert processor.decode_new(sequences, ids.shape[1]) == ["yes, no"] * 2
