"""OpenFlamingo as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.utils.generic import ModelOutput

from kuea_mllm.adapters.openflamingo.base_model import OpenFlamingoModel
from kuea_mllm.adapters.openflamingo.configuration import OpenFlamingoConfig
from kuea_mllm.adapters.openflamingo.media import EncodedImages, media_index
from kuea_mllm.adapters.openflamingo.pretrained import OpenFlamingoPreTrainedModel
from kuea_mllm.errors import UserError


@dataclass
class OpenFlamingoOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: Mean cross-entropy of the labels, shifted inside; only with labels.
        logits: (rows, positions kept, vocabulary).
        past_key_values: The cache; only with `use_cache`.
        hidden_states: Stream before each layer and the final norm's output; only when asked for.
        image_hidden_states: Latents of the images, (examples, images, latents, width).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass(frozen=True)
class OpenFlamingoReading:
    """What the model knows before its output layer.

    Attributes:
        last: The final norm's output, (rows, positions, width).
        states: Stream before each layer and `last`; only when asked for.
        past_key_values: The cache, if there is one.
        image_features: Latents of the images, (examples, images, latents, width).
    """

    last: Tensor
    states: tuple[Tensor, ...] | None
    past_key_values: Any
    image_features: Tensor | None


class OpenFlamingoForConditionalGeneration(OpenFlamingoPreTrainedModel, GenerationMixin):
    """OpenFlamingo with its tied output layer: interleaved images and text in, text out."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }

    def __init__(self, config: OpenFlamingoConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        text: Any = config.text_config
        self.model = OpenFlamingoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        layer: nn.Module = self.lm_head
        return layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = cast(nn.Linear, new_embeddings)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn images (..., 3, height, width) into latents (..., latents, width)."""
        latents: Tensor = self.model.encode_images(pixel_values)
        return latents

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | EncodedImages | None = None,
        media_index: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> OpenFlamingoOutput | tuple[Any, ...]:
        """Compute logits, and a loss where labels are given.

        Args:
            input_ids: (rows, positions), `<image>` where an image belongs.
            pixel_values: (rows, images, 3, height, width), rows with fewer images filled with
                zeros at the end; or give `image_features`.
            attention_mask: (rows, positions of the cache and new ones), 1 on real tokens. None
                hides nothing, padding included.
            past_key_values: The cache, changed in place.
            inputs_embeds: Instead of `input_ids`; needs `media_index` where there are images.
            image_features: What `encode_images` gave, (rows, images, latents, width).
            media_index: Image that each new position sees, counted from 1, (rows, positions); by
                default counted in `input_ids`, which must then begin with the text's beginning.
            labels: (rows, positions), -100 where nothing is to be learnt; shifted inside.
            use_cache: Whether to return a cache; by default as configured, and not in training.
            output_hidden_states: Whether to return the hidden states.
            logits_to_keep: Number of last positions to compute logits for (0: all), or which.
            return_dict: False returns a tuple.
            **kwargs: Given to the loss (`num_items_in_batch`).

        Raises:
            UserError: If the text is longer than the language model's context.
            ValueError: If the inputs do not fit one another.
        """
        wanted = self.config.output_hidden_states
        wanted = output_hidden_states if output_hidden_states is not None else wanted
        read = self.read(
            input_ids,
            pixel_values,
            attention_mask,
            past_key_values,
            inputs_embeds,
            image_features,
            media_index,
            use_cache,
            keep_states=bool(wanted),
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(read.last[:, keep])
        loss = None
        if labels is not None:
            vocabulary = logits.shape[-1]
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, **kwargs)
        output = OpenFlamingoOutput(
            loss=loss,
            logits=logits,
            past_key_values=read.past_key_values,
            hidden_states=read.states,
            image_hidden_states=read.image_features,
        )
        return output.to_tuple() if return_dict is False else output

    def read(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | EncodedImages | None = None,
        media_index: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        keep_states: bool = False,
    ) -> OpenFlamingoReading:
        """Run everything but the output layer.

        Args and errors as of `forward`; `keep_states` is its `output_hidden_states`.
        """
        past_key_values = self._cache(past_key_values, use_cache)
        self._check_inputs(input_ids, inputs_embeds, past_key_values)
        images = self._encoded(pixel_values, image_features)
        if images is not None:
            _check_rows(input_ids if input_ids is not None else inputs_embeds, images)
            if media_index is None:
                media_index = self._count_images(input_ids, past_key_values)
        elif media_index is None:
            self._refuse_places_without_images(input_ids)
        last, states = self.model(
            input_ids,
            attention_mask,
            images,
            media_index,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            keep_states=keep_states,
        )
        features = None if images is None else images.features
        return OpenFlamingoReading(last, states, past_key_values, features)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | EncodedImages | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; images and prompt are read once per example, also under beam search.

        Args:
            inputs: Ids, also taken as `input_ids`.
            pixel_values: As for `forward`.
            image_features: As for `forward`.
            **kwargs: As for transformers' `generate`.
        """
        images = self._encoded(pixel_values, image_features)
        if images is not None:
            _check_rows(kwargs.get("input_ids") if inputs is None else inputs, images)
            kwargs["image_features"] = EncodedImages(images.features, projected={})
        else:
            self._refuse_places_without_images(kwargs.get("input_ids", inputs))
        parent: Any = super()
        return parent.generate(inputs, **self._read_prompt(inputs, kwargs))

    def _read_prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fill the cache once per example where transformers would do it for each beam.

        All beams begin with the same text; with demonstrations it is most of the work.
        """
        settings = kwargs.get("generation_config") or self.generation_config

        def option(name: str) -> Any:
            given = kwargs.get(name)
            return getattr(settings, name, None) if given is None else given

        beams = option("num_beams") or 1
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        # Left to transformers: searches of the caller, a cache that is there already or of another
        # kind, and texts whose padding it has to guess.
        own = ("custom_generate", "past_key_values", "cache_implementation")
        if (
            beams == 1
            or any(option(name) is not None for name in own)
            or option("use_cache") is False
            or input_ids is None
            or mask is None
            or input_ids.shape[1] < 2
        ):
            return kwargs
        cache = DynamicCache()
        self(
            input_ids=input_ids[:, :-1],
            attention_mask=mask[:, :-1],
            image_features=kwargs.get("image_features"),
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(beams)
        return kwargs | {"past_key_values": cache}

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut the inputs down to what the cache lacks; images are counted in the whole text."""
        kwargs.pop("media_index", None)
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values=past_key_values, **kwargs
        )
        new = inputs["input_ids"]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if new is None or past + new.shape[1] != input_ids.shape[1]:
            raise ValueError(
                "generate needs the ids of the whole text, also when it goes on from a cache: "
                "which image a position sees is counted from the beginning."
            )
        index = media_index(input_ids, self.config.image_token_id)
        inputs["media_index"] = index[:, past:].to(new.device)
        return inputs

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> Any:
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past_key_values is None:
            return DynamicCache() if wanted else None
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("a static cache is not supported; leave cache_implementation unset.")
        return past_key_values

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past_key_values: Any
    ) -> None:
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds.")
        text: Any = self.config.text_config
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length, longest = past + given.shape[1], text.max_position_embeddings
        if length > longest:
            raise UserError(
                f"the text is {length} tokens long, the language model's context is {longest}.",
                "Use fewer demonstrations or a shorter prompt.",
            )

    def _encoded(
        self, pixel_values: Tensor | None, image_features: Tensor | EncodedImages | None
    ) -> EncodedImages | None:
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("give either pixel_values or image_features, not both.")
            if pixel_values.dim() != 5:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}; expected "
                    "(rows, images, 3, height, width)."
                )
            image_features = self.encode_images(pixel_values)
        if isinstance(image_features, Tensor):
            return EncodedImages(image_features) if image_features.shape[1] else None
        return image_features

    def _count_images(self, input_ids: Tensor | None, past_key_values: Any) -> Tensor:
        if input_ids is None or (past_key_values is not None and past_key_values.get_seq_length()):
            raise ValueError(
                "media_index is needed here: which image a position sees is counted from the "
                "beginning of the text, which these inputs do not hold."
            )
        return media_index(input_ids, self.config.image_token_id)

    def _refuse_places_without_images(self, input_ids: Tensor | None) -> None:
        if input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "the text holds <image> tokens, but no images were given: neither pixel_values nor "
                "image_features."
            )


def _check_rows(text: Tensor | None, images: EncodedImages) -> None:
    """Make sure that every row of text has its images; only kept ones may serve several rows."""
    examples = images.features.shape[0]
    rows = examples if text is None else text.shape[0]
    if rows != examples and (images.projected is None or rows % examples):
        raise ValueError(f"there are {rows} rows of text and images for {examples}.")
