"""Tuning of OpenFlamingo's language model: its parts, its samples, its forward.

No layer of OpenFlamingo was ever instruction-tuned with images: "Instruct" means a language model
tuned on text, under the same multimodal training on captions (fact sheet, section 1). So samples
are written as the published evaluation asks visual questions, which is the only format with
questions that is known for this model (fact sheet, section 6.1):

    <image>Question:{question} Short answer:{answer}<|endofchunk|>

with a line break between rounds, as between the evaluation's demonstrations. All rounds see the one
image, which stands in front of the round that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.loading import failures_named
from kuea_mllm.adapters.openflamingo.adapter import TOWER_MODULE, resolve_config
from kuea_mllm.adapters.openflamingo.processing import (
    END_OF_CHUNK,
    IMAGE_TAG,
    PADDING,
    OpenFlamingoImageProcessor,
    OpenFlamingoProcessor,
)
from kuea_mllm.adapters.openflamingo.runtime import build_prompt
from kuea_mllm.adapters.packing import packed_again, side_by_side
from kuea_mllm.adapters.turns import IGNORED, IMAGE_PLACEHOLDER, alternating_turns
from kuea_mllm.adapters.vocabulary import count_token_rows, read_tokenizer_files
from kuea_mllm.errors import DataError, UserError

_CROSS_ATTENTION = "cross_attention"
_BETWEEN_ROUNDS = "\n"


class EncodedRounds(NamedTuple):
    """One sample; see `EncodedSample`."""

    input_ids: list[int]
    labels: list[int]
    left_out: int


class FlamingoConversations:
    """Encodes conversations as the published evaluation writes questions and answers.

    Learned are the answers and the `<|endofchunk|>` behind each.

    Args:
        tokenizer: GPT-NeoX's with OpenFlamingo's tokens.
        max_length: Longest sample in tokens.
    """

    placeholder = IMAGE_PLACEHOLDER

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id: int = tokenizer.pad_token_id
        self._image: int = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
        self._end: int = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)

    def encode(self, record: Mapping[str, Any]) -> EncodedRounds:
        """Encode a record in the schema of LLaVA's mixture.

        An image without a tag in any turn stands before the first question.

        Raises:
            DataError: If its turns do not alternate; names the record.
        """
        turns = alternating_turns(record)
        image_at = -1
        if record.get("image") is not None:
            tagged = [n for n, turn in enumerate(turns) if IMAGE_TAG in turn["value"]]
            image_at = (tagged or [0])[0] // 2
        ids: list[int] = []
        labels: list[int] = []
        for number in range(0, len(turns), 2):
            question, *answer = (_plain(turn["value"]) for turn in turns[number : number + 2])
            prompt = build_prompt(question, image_count=int(number // 2 == image_at))
            asked = self._ids(f"{_BETWEEN_ROUNDS if number else ''}{prompt}")
            ids += asked
            labels += [IGNORED] * len(asked)
            for text in answer:
                # Tokenized by itself, as a model that answers gives it.
                answered = [*self._ids(text), self._end]
                ids += answered
                labels += answered
        return EncodedRounds(ids, labels, 0)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [IMAGE_PLACEHOLDER if token == self._image else token for token in ids]


class FlamingoImages:
    """The model's own preprocessing: resized, cropped to a square, made RGB.

    Args:
        processor: The model's image processor.
    """

    def __init__(self, processor: OpenFlamingoImageProcessor) -> None:
        self._processor = processor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pixel values, (images, 3, height, width), float32."""
        values: Tensor = self._processor(list(images))["pixel_values"]
        return values


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`.

    The gated cross-attention lies inside of the language model's layers and takes no LoRA.

    Raises:
        UserError: If tokenizer and configuration do not belong together.
    """
    rows = resolve_config(base).text_config.vocab_size
    return TuningParts(
        language_model="model.language_model",
        projector=("model.resampler",),
        vision_tower=TOWER_MODULE,
        output_head="lm_head",
        # All rows were in the softmax that the model was trained with, <image> and <PAD> included.
        vocabulary_size=count_token_rows(read_tokenizer_files(base), rows, additions=()),
        excluded=(_CROSS_ATTENTION,),
    )


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`.

    Raises:
        UserError: If the processor is missing, or samples would exceed the model's context.
    """
    config = resolve_config(base)
    context = config.text_config.max_position_embeddings
    if max_length > context:
        raise UserError(
            f"key 'data.max_length' is {max_length}; the language model of {base} reads {context} "
            "tokens at most.",
            f"Set data.max_length={context}.",
        )
    with failures_named(base, torch.device("cpu")):
        processor: Any = OpenFlamingoProcessor.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    return TuningFormat(
        encoder=FlamingoConversations(processor.tokenizer, max_length=max_length),
        preprocess=FlamingoImages(processor.image_processor),
        image_token_id=config.image_token_id,
        tokens_per_image=1,
        image_size=processor.image_processor.image_size,
    )


def hidden_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the output layer reads; see `MLLMTuner`.

    Raises:
        DataError: If there are not as many `<image>` tokens as images.
    """
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    lengths: Sequence[int] = ()
    if "position_ids" in batch:
        # Neither this model's attention nor its count of images can begin anew inside of a row.
        input_ids, mask, lengths = side_by_side(input_ids, batch["position_ids"])
    features = None
    if (pixel_values := batch.get("pixel_values")) is not None:
        is_image = input_ids == model.config.image_token_id
        if mask is not None:
            is_image = is_image & mask.bool()
        latents = image_features(model, pixel_values)
        features = _by_row(latents, is_image.sum(dim=1))
    output: Tensor = model.read(
        input_ids, attention_mask=mask, image_features=features, use_cache=False
    ).last
    return packed_again(output, lengths, batch["input_ids"].shape) if lengths else output


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Return the latents that the text attends to, (images, latents, width)."""
    inner = model.model
    with torch.no_grad():
        tower = inner.vision_tower
        tokens = tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state[:, 1:]
    latents: Tensor = inner.resampler(tokens)
    return latents


def _by_row(latents: Tensor, counts: Tensor) -> Tensor:
    """Return images in the rows that they belong to, zeros where a row has fewer."""
    if (found := int(counts.sum())) != len(latents):
        raise DataError(f"a batch has {found} {IMAGE_TAG} tokens and {len(latents)} images.")
    groups: Any = torch.split(latents, counts.tolist())
    return nn.utils.rnn.pad_sequence(list(groups), batch_first=True)


def _plain(text: str) -> str:
    """Return a turn without what would be taken for a token of the format."""
    for tag in (IMAGE_TAG, END_OF_CHUNK, PADDING):
        text = text.replace(tag, "")
    return text.strip()
