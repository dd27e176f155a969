"""One vision tower in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.towers.formats import convert, keys
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.spec import TowerSpec


@dataclass
class Tower:
    """A vision tower: always a transformers model inside, whatever the format at the door.

    Attributes:
        model: `CLIPVisionModelWithProjection`, `SiglipVisionModel`, or `CLIPVisionModel` for a
            CLIP tower that came without projection; in eval mode.
        spec: Architecture and preprocessing.
        source: The path or hub id it was loaded from.
        layout: Name of the format it came in; see `formats.layouts.LAYOUTS`.
        manifest: Content of `kuea.json` if the tower was written by this project.
    """

    model: PreTrainedModel
    spec: TowerSpec
    source: str
    layout: str
    manifest: dict[str, Any] | None = None

    @property
    def has_projection(self) -> bool:
        """Whether the pooled output is the family's image embedding."""
        return not isinstance(self.model, CLIPVisionModel)

    @property
    def fingerprint(self) -> str:
        """Content hash of the vision body as it is now; see `fingerprint_state`."""
        return fingerprint_state(self.model.state_dict())

    def canonical_state(self) -> convert.State:
        """Return the weights under canonical names; tensors are shared with the model."""
        return convert.hf_to_canonical(self.model.state_dict())


def build_model(
    spec: TowerSpec,
    state: Mapping[str, Tensor],
    *,
    where: str,
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Build the transformers model of a spec and fill it with weights, strictly.

    Args:
        spec: Architecture; must agree with the weights.
        state: Weights under canonical names; copied, unless `dtype` is None.
        where: What to call the source in errors.
        dtype: Dtype of the model's weights; None gives every tensor the dtype it has in `state`.

    Returns:
        The model in eval mode, with sdpa attention.

    Raises:
        TowerError: If a key is missing or unknown.
        TowerMismatch: If a tensor has another shape than the spec implies.
    """
    config, model_class = architecture(spec, has_projection=keys.PROJECTION in state)
    with no_init_weights():
        # sdpa: the eager attention of transformers does its softmax in float32 even for float64.
        make: Any = model_class._from_config
        model: Any = make(config, attn_implementation="sdpa").to(dtype or torch.float32)
    names = {name.removeprefix(keys.HF_PREFIX): name for name in model.state_dict()}
    convert.refuse_keys(
        where, missing=names.keys() - state.keys(), unknown=state.keys() - names.keys()
    )
    for name, target in names.items():
        shape = model.get_parameter(target).shape
        if shape != state[name].shape:
            raise TowerMismatch(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the configuration "
                f"implies {tuple(shape)}."
            )
    weights = {target: state[name] for name, target in names.items()}
    if dtype is None:
        # Not copied: what a file maps into memory stays there until it is read.
        shared = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        model.load_state_dict(shared, assign=True)
    else:
        model.load_state_dict(weights)
    return cast(PreTrainedModel, model.eval())


def build_meta_model(spec: TowerSpec, *, has_projection: bool = True) -> PreTrainedModel:
    """Build the transformers model of a spec on the meta device: shapes, but no memory.

    For counting parameters and operations before anything is loaded.

    Args:
        spec: Architecture.
        has_projection: Whether a CLIP tower has its projection.

    Raises:
        TowerError: If the head count does not divide the width.
    """
    config, model_class = architecture(spec, has_projection=has_projection)
    make: Any = model_class._from_config
    with torch.device("meta"), no_init_weights():
        model = make(config, attn_implementation="sdpa")
    return cast(PreTrainedModel, model.eval())


def architecture(
    spec: TowerSpec, *, has_projection: bool
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """Return transformers' configuration and class for a spec.

    Raises:
        TowerError: If the head count does not divide the width.
    """
    if spec.width % spec.heads:
        raise TowerError(
            f"a tower of width {spec.width} cannot have {spec.heads} heads.",
            "State the right number with --heads.",
        )
    shared: dict[str, Any] = {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": spec.activation,
        "layer_norm_eps": spec.layer_norm_eps,
    }
    if spec.family == "siglip":
        return SiglipVisionConfig(**shared), SiglipVisionModel
    config = CLIPVisionConfig(**shared, projection_dim=spec.embedding_width)
    return config, CLIPVisionModelWithProjection if has_projection else CLIPVisionModel
