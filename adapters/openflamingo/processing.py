"""Images and text the way OpenFlamingo was trained with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from kuea_mllm.errors import DataError, UserError

IMAGE_TAG = "<image>"
END_OF_CHUNK = "<|endofchunk|>"
PADDING = "<PAD>"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What transformers 4 did to decoded text by default and transformers 5 leaves out (trap 6).
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class OpenFlamingoImageProcessor(BaseImageProcessor):
    """open_clip's evaluation transform: the picture becomes RGB *after* it was resized and cropped.

    transformers' CLIP processor converts first, which moves the normalised pixels of transparent
    and palette images by up to 1 (fact sheet, trap 11).

    Args:
        image_size: Height and width of the result.
        image_mean: Channel means.
        image_std: Channel deviations.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int = 224,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], *, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Preprocess images; the options of other processors have one value here.

        Args:
            images: PIL images of any mode and size.
            return_tensors: As for other processors; "pt" is all there is.

        Returns:
            `pixel_values`, (images, 3, image_size, image_size), float32.

        Raises:
            DataError: If an image cannot be decoded.
        """
        _check_framework(return_tensors)
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        values = [self._pixels(picture) for picture in pictures]
        size = self.image_size
        stacked = torch.stack(values) if values else torch.zeros(0, 3, size, size)
        return BatchFeature({"pixel_values": stacked})

    def _pixels(self, picture: Image.Image) -> Tensor:
        try:
            rgb = _cropped(picture, self.image_size).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            name = getattr(picture, "filename", "") or f"of mode {picture.mode}, {picture.size}"
            raise DataError(f"image {name} cannot be decoded: {error}.") from error
        levels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float().div(255)
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (levels - mean[:, None, None]) / std[:, None, None]


class OpenFlamingoProcessor(ProcessorMixin):
    """Tokenizes prompts with `<image>` and puts their images beside them.

    The tokenizer gets `<|endofchunk|>`, `<image>` and `<PAD>`, in this order and at its end, unless
    it has them; padding is on the left.

    Args:
        image_processor: An `OpenFlamingoImageProcessor`.
        tokenizer: GPT-NeoX's, with or without the three tokens.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        add_special_tokens(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
        self.endofchunk_token_id: int = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor; makes its parts known to transformers first."""
        from kuea_mllm.adapters.openflamingo.registration import register

        register()
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self,
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        text: str | Sequence[str] = "",
        *,
        max_length: int | None = None,
        released_counts: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: Images per row in the order of the prompt; a flat list for one prompt.
            text: One prompt per row, `<image>` where an image belongs.
            max_length: Refuse prompts with more tokens than this.
            released_counts: Take images and `<image>` tokens in any numbers, as the released
                evaluation does (fact sheet, section 6.4); they have to match otherwise.
            return_tensors: As for other processors; "pt" is all there is.

        Returns:
            `input_ids` and `attention_mask` (boolean), (rows, longest prompt), padded on the left;
            `pixel_values`, (rows, most images, 3, height, width), zeros where a row has fewer;
            absent if no row has an image.

        Raises:
            UserError: If images and `<image>` tokens do not match, or a prompt is too long.
            DataError: If an image cannot be decoded.
        """
        _check_framework(return_tensors)
        prompts = [text] if isinstance(text, str) else list(text)
        rows = _image_rows(images, len(prompts))
        if not released_counts:
            _check_counts(prompts, rows)
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        width = max(len(row) for row in ids)
        if max_length is not None and width > max_length:
            raise UserError(
                f"prompt {[len(row) for row in ids].index(width)} has {width} tokens, more than "
                f"the {max_length} there is room for.",
                "Use fewer demonstrations or a shorter prompt.",
            )
        input_ids = torch.full((len(ids), width), int(self.tokenizer.pad_token_id))
        attention_mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for number, row in enumerate(ids):
            input_ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            attention_mask[number, width - len(row) :] = True
        batch: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if any(rows):
            batch["pixel_values"] = self._pixel_values(rows)
        return BatchFeature(batch)

    def decode_new(self, sequences: Tensor, prompt_length: int) -> list[str]:
        """Decode what was generated.

        Args:
            sequences: What `generate` returned, (rows, prompt and new tokens).
            prompt_length: Length of the padded prompt.

        Returns:
            Text of the new tokens, special tokens skipped, blanks before punctuation removed.
        """
        texts = self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [clean_up(text) for text in texts]

    def _pixel_values(self, rows: Sequence[Sequence[Image.Image]]) -> Tensor:
        size = self.image_processor.image_size
        values = torch.zeros(len(rows), max(len(row) for row in rows), 3, size, size)
        for number, row in enumerate(rows):
            values[number, : len(row)] = self.image_processor(row)["pixel_values"]
        return values


def add_special_tokens(tokenizer: Any) -> None:
    """Give a GPT-NeoX tokenizer the three tokens of OpenFlamingo, and padding on the left.

    The padding token is set explicitly: transformers 5 gives GPT-NeoX one of its own, and the
    embedding would then be one row short (fact sheet, trap 5).
    """
    known = tokenizer.get_vocab()
    new = [token for token in (END_OF_CHUNK, IMAGE_TAG) if token not in known]
    if new:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": new}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token != PADDING:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    tokenizer.padding_side = "left"
    # Saving writes the settings that the tokenizer was made with.
    tokenizer.init_kwargs["padding_side"] = "left"


def clean_up(text: str) -> str:
    """Remove the blanks that transformers 4 removed from decoded text."""
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


def _cropped(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    if min(width, height) != size:
        # Both sides as torchvision computes them: the longer one cut off, not rounded.
        longer = int(size * max(width, height) / min(width, height))
        shape = (size, longer) if width <= height else (longer, size)
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
        width, height = shape
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    picture = picture.crop((left, top, left + size, top + size))
    # A note of old palette files, without effect on RGB but for a warning.
    picture.info.pop("transparency", None)
    return picture


def _image_rows(images: Any, prompts: int) -> list[list[Image.Image]]:
    if images is None:
        return [[] for _ in range(prompts)]
    rows = list(images)
    if rows and isinstance(rows[0], Image.Image):
        rows = [rows]
    if len(rows) != prompts:
        raise UserError(
            f"there are {prompts} prompts and {len(rows)} lists of images.",
            "Give one list of images per prompt, an empty one where there are none.",
        )
    return [list(row) for row in rows]


def _check_counts(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> None:
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens = len(re.findall(re.escape(IMAGE_TAG), prompt))
        if tokens != len(row):
            raise UserError(
                f"prompt {number} holds {tokens} {IMAGE_TAG} tokens and comes with {len(row)} "
                "images.",
                f"Put one {IMAGE_TAG} where each image belongs.",
            )


def _check_framework(return_tensors: str) -> None:
    if return_tensors != "pt":
        raise UserError(f"return_tensors is {return_tensors!r}; only 'pt' is supported.")
