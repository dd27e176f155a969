"""Configuration of OpenFlamingo in Hugging Face form."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPVisionConfig
from transformers.configuration_utils import PreTrainedConfig

from kuea_mllm.errors import UserError

# What the original calls its language models -> what it is, for refusals.
_OTHER_LANGUAGE_MODELS = {
    "gpt_neox": "RedPajama-INCITE, the language model of OpenFlamingo-4B",
    "mpt": "transformers' MPT, which drops the query and key norms of MPT-1B without a word",
    "mosaic_gpt": "the configuration of the language model before conversion",
}


class OpenFlamingoTextConfig(PreTrainedConfig):
    """The MPT language model of OpenFlamingo: ALiBi, no biases, tied output.

    The defaults are those of MPT-1B. `qk_norm` is on for MPT-1B (whose queries and keys are
    normalised over the full width, before the heads are split) and off for MPT-7B.
    """

    model_type = "openflamingo_mpt"

    vocab_size: int = 50280
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    alibi: bool = True
    alibi_bias_max: int = 8
    qk_norm: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what the model code relies on.

        Raises:
            UserError: If the width does not divide into heads, or the output is not tied.
        """
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"text_config: hidden_size {self.hidden_size} does not divide into "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if not self.tie_word_embeddings:
            raise UserError(
                "text_config: tie_word_embeddings is false, but MPT has no output layer of its own."
            )


class OpenFlamingoConfig(PreTrainedConfig):
    """OpenFlamingo: a CLIP tower, a perceiver resampler, gated cross-attention, a language model.

    The defaults are those of OpenFlamingo-3B.

    Attributes:
        vision_config: The tower, a `CLIPVisionConfig`.
        text_config: The language model, an `OpenFlamingoTextConfig`.
        perceiver_depth: Layers of the resampler.
        num_latents: Tokens that the resampler makes of an image.
        resampler_heads: Heads of its attention.
        resampler_head_dim: Width of each of them.
        resampler_ff_mult: Width of its feed-forward, in units of the tower's width.
        cross_attention_every: A gated block precedes decoder layer n where (n + 1) is a multiple.
        cross_attention_heads: Heads of the gated blocks.
        cross_attention_head_dim: Width of each of them.
        cross_attention_ff_mult: Width of their feed-forward, in units of `hidden_size`.
        only_attend_immediate_media: Whether text sees the image before it alone, as trained; false
            shows it every earlier image.
        image_token_id: Id of `<image>`.
        endofchunk_token_id: Id of `<|endofchunk|>`, which ends an answer.
    """

    model_type = "openflamingo"
    # The base class makes a dataclass of this one, so that both need their types.
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": CLIPVisionConfig,
        "text_config": OpenFlamingoTextConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    perceiver_depth: int = 6
    num_latents: int = 64
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_ff_mult: int = 4
    cross_attention_every: int = 1
    cross_attention_heads: int = 8
    cross_attention_head_dim: int = 64
    cross_attention_ff_mult: int = 4
    only_attend_immediate_media: bool = True
    image_token_id: int = 50278
    endofchunk_token_id: int = 50277
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the parts.

        Raises:
            UserError: If the tower or the language model is of another kind.
        """
        self.vision_config = _part(self.vision_config, "vision_config", _vision_defaults())
        self.text_config = _part(self.text_config, "text_config", OpenFlamingoTextConfig())
        if self.cross_attention_every < 1:
            raise UserError(
                f"cross_attention_every is {self.cross_attention_every}; it must be at least 1."
            )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def _vision_defaults() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
        hidden_act="quick_gelu",
    )


def _part(
    given: dict[str, Any] | PreTrainedConfig | None, name: str, default: PreTrainedConfig
) -> PreTrainedConfig:
    kind = type(default)
    if given is None:
        return default
    values = given if isinstance(given, dict) else given.to_dict()
    stated = values.get("model_type", kind.model_type)
    if stated != kind.model_type:
        what = _OTHER_LANGUAGE_MODELS.get(str(stated), "another kind of model")
        raise UserError(
            f"{name} says model_type {stated!r}: {what}; this model takes {kind.model_type!r}.",
            "OpenFlamingo-3B and its Instruct variant are supported.",
        )
    return given if isinstance(given, kind) else kind(**values)
