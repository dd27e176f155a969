"""How a processor of transformers reads a sample, found by letting it read some.

Tuning puts batches together by itself, which works for models that give an image the same number of
tokens whatever its shape, and want nothing but its pixels. Both are measured here, and what is put
together is compared with what the processor makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import TuningFormat
from kuea_mllm.adapters.hf_vlm.conversations import ChatConversations, ImagePlace
from kuea_mllm.adapters.images import as_plain_rgb
from kuea_mllm.adapters.turns import IMAGE_PLACEHOLDER
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_SHAPES = ((64, 64), (300, 60), (60, 300), (640, 480))
# What a processor may give; the last two only say where the image's tokens are.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_KNOWN = {"input_ids", "attention_mask", "pixel_values", *_TOKEN_TYPES}
_OWN_ADAPTER = "Tuning it needs an adapter of its own; its tower can be swapped all the same."
_RECORDS: tuple[dict[str, Any], ...] = (
    {
        "id": "an image first",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat, (it) seems."},
            {"from": "human", "value": "Where? "},
            {"from": "gpt", "value": "There"},
        ],
    },
    {
        "id": "an image later",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Yes?"},
            {"from": "human", "value": "Who is <image> on the left?"},
            {"from": "gpt", "value": "Nobody."},
        ],
    },
    {
        "id": "text",
        "conversations": [
            {"from": "human", "value": "One and one?"},
            {"from": "gpt", "value": "Two, I'd say."},
        ],
    },
)


class ProcessorImages:
    """Preprocesses images as the model's processor does.

    Args:
        image_processor: Of transformers.
    """

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Return pixel values, (images, 3, height, width), float32.

        Raises:
            DataError: If an image cannot be decoded.
        """
        rgb = [as_plain_rgb(image) for image in images]
        values: Tensor = self._processor(rgb, return_tensors="pt")["pixel_values"]
        return values.float()


class _Listener:
    """A tokenizer that remembers what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.adds_special_tokens = True

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        self.adds_special_tokens = options.get("add_special_tokens", True)
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def read_format(
    processor: Any, image_token_id: int, base: Path, where: str, *, max_length: int
) -> TuningFormat:
    """Return how samples are read.

    Args:
        processor: Of the model, with a chat template.
        image_token_id: Stands for the patches of images in the model's input.
        base: Model directory.
        where: What to call the model in messages.
        max_length: Longest sample in tokens.

    Raises:
        UserError: If the model reads images or conversations in a way that is not known here.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast or not isinstance(processor.chat_template, str):
        raise UserError(
            f"{where} has several chat templates or a slow tokenizer.",
            "Tuning needs a single chat template and a tokenizer.json.",
        )
    pictures = _pictures()
    images = ProcessorImages(processor.image_processor)
    size = _check_images(processor, images, pictures, image_token_id, where)
    encoder = ChatConversations(
        tokenizer,
        processor.chat_template,
        _image_place(processor, pictures[0], image_token_id, where),
        ends=_end_tokens(base, tokenizer),
        image_words=_image_words(processor),
        max_length=max_length,
        where=where,
    )
    count = encoder._place.count
    for record in _RECORDS:
        encoded = encoder.encode(record).input_ids
        found = [
            token
            for each in encoded
            for token in ([image_token_id] * count if each == IMAGE_PLACEHOLDER else [each])
        ]
        messages = encoder.messages(record, pictures[0])
        expected = _processed(processor, messages, where, False)["input_ids"][0].tolist()
        if found != expected:
            raise UserError(
                f"the processor of {where} reads a sample with {record['id']} as "
                f"{len(expected)} other tokens than its chat template and tokenizer alone.",
                _OWN_ADAPTER,
            )
    return TuningFormat(
        encoder=encoder,
        preprocess=images,
        image_token_id=image_token_id,
        tokens_per_image=count,
        image_size=size,
    )


def _check_images(
    processor: Any, images: ProcessorImages, pictures: Sequence[Image], token: int, where: str
) -> int:
    """Make sure that images of every shape are read alike; return their height and width."""
    import torch

    counts, shapes = [], []
    for picture in pictures:
        batch = _processed(processor, _question(picture), where)
        ids = batch["input_ids"]
        for name in _TOKEN_TYPES:
            if name in batch and not torch.equal(batch[name] != 0, ids == token):
                raise UserError(
                    f"{where} marks other tokens than those of images with {name}, as models do "
                    "that read a question in both directions.",
                    _OWN_ADAPTER,
                )
        if more := sorted(set(batch) - _KNOWN):
            raise UserError(
                f"{where} reads images with {', '.join(more)} besides their pixels.", _OWN_ADAPTER
            )
        counts.append(int((ids == token).sum()))
        shapes.append(tuple(batch["pixel_values"].shape))
    if len(set(counts)) > 1 or len(set(shapes)) > 1 or not counts[0]:
        raise UserError(
            f"{where} takes a number of tokens for an image that depends on its shape "
            f"({', '.join(map(str, counts))} tokens, pixels of {len(set(shapes))} shapes, for "
            f"{len(pictures)} images).",
            _OWN_ADAPTER,
        )
    shape = shapes[0]
    if len(shape) != 4 or shape[:2] != (1, 3) or shape[2] != shape[3]:
        raise UserError(
            f"{where} reads an image as pixels of shape {shape}; known is (1, 3, size, size).",
            _OWN_ADAPTER,
        )
    apart = images(list(pictures))
    for number, picture in enumerate(pictures):
        whole = _processed(processor, _question(picture), where)["pixel_values"]
        if not torch.equal(apart[number : number + 1], whole.float()):
            raise UserError(
                f"the processor of {where} reads images otherwise than its image processor alone.",
                _OWN_ADAPTER,
            )
    return int(shape[2])


def _image_place(processor: Any, picture: Image, token: int, where: str) -> ImagePlace:
    """Find what the template writes for an image, and what the processor makes of it."""
    messages = _question(picture)
    template = processor.apply_chat_template(messages, add_generation_prompt=True)
    listener = _Listener(processor.tokenizer)
    processor.tokenizer = listener
    try:
        _processed(processor, messages, where)
    finally:
        processor.tokenizer = listener.tokenizer
    word = listener.tokenizer.convert_ids_to_tokens(token)
    for tag in sorted(_image_words(processor), key=len, reverse=True):
        before, found, after = template.partition(tag)
        written = listener.text[len(before) : len(listener.text) - len(after)]
        if not found or f"{before}{written}{after}" != listener.text:
            continue
        count = written.count(word)
        if count and word * count in written:
            return ImagePlace(
                tag,
                written.replace(word * count, word),
                token,
                count,
                listener.adds_special_tokens,
            )
    raise UserError(
        f"the processor of {where} does not write the tokens of an image in one run.",
        _OWN_ADAPTER,
    )


def _processed(
    processor: Any, messages: Sequence[Any], where: str, asks: bool = True
) -> dict[str, Any]:
    try:
        return dict(
            processor.apply_chat_template(
                list(messages),
                add_generation_prompt=asks,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    # The template is a program of the model's, and processors raise many kinds of exceptions.
    except Exception as error:
        raise UserError(
            f"chat template and processor of {where} cannot take a conversation "
            f"({type(error).__name__}: {error}).",
            "Restore chat_template.jinja and processor_config.json from the base model.",
        ) from error


def _question(picture: Image) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "What is it?"}
    return [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]


def _pictures() -> list[Image]:
    from PIL import Image

    # Gradients: pixels of one colour would hide another crop.
    gradient = Image.linear_gradient("L")
    return [
        Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).resize(shape)
        for shape in _SHAPES
    ]


def _image_words(processor: Any) -> list[str]:
    """Return the texts of a model's own tokens around and for images."""
    names = ("image_token", "boi_token", "eoi_token")
    words = [
        str(word)
        for owner in (processor, processor.tokenizer)
        for name in names
        if (word := getattr(owner, name, None))
    ]
    return list(dict.fromkeys(words))


def _end_tokens(base: Path, tokenizer: Any) -> list[str]:
    """Return the tokens at which the model stops."""
    stated: list[Any] = [tokenizer.eos_token_id]
    path = base / "generation_config.json"
    if path.is_file():
        ends = read_json(path).get("eos_token_id")
        stated += ends if isinstance(ends, list) else [ends]
    numbers = dict.fromkeys(number for number in stated if number is not None)
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in numbers]
