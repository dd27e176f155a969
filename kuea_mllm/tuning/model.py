"""The trained model as the trainer sees it: from a batch to a sum of losses."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import MLLMTuner, TuningParts
from kuea_mllm.tuning.loss import chunked_cross_entropy

_NOT_FOR_THE_MODEL = frozenset({"predicting", "targets", "idle_pixel_values"})


class TuningModel(nn.Module):
    """A model with LoRA layers, and its loss.

    Args:
        wrapped: A `peft.PeftModel` from `wrap_with_lora`.
        tuner: Of the adapter that knows the model.
        parts: Where its parts are.
        chunk: Positions whose logits are held at once.
        autocast: Dtype of the arithmetic; float32 means no autocast.
    """

    def __init__(
        self,
        wrapped: Any,
        tuner: MLLMTuner,
        parts: TuningParts,
        *,
        chunk: int,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.tuner = tuner
        self.parts = parts
        self._chunk = chunk
        self.autocast = autocast

    @property
    def inner(self) -> nn.Module:
        """The adapter's model, LoRA layers in place."""
        inner: nn.Module = self.wrapped.get_base_model()
        return inner

    def train(self, mode: bool = True) -> Self:
        """Switch dropout of the LoRA layers; encoders stay as they answer questions."""
        super().train(mode)
        for path in self.parts.encoders:
            self.inner.get_submodule(path).eval()
        return self

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of a batch, a float32 scalar.

        Args:
            batch: What `MLLMTuner.hidden_states` takes, and `predicting`, `targets` as
                `supervised_positions` gives them; `idle_pixel_values` for a batch without an image
                whose projector gets a gradient of zeros all the same.
        """
        device = batch["input_ids"].device.type
        is_on = self.autocast != torch.float32
        with torch.autocast(device, self.autocast if is_on else torch.bfloat16, enabled=is_on):
            idle = None
            if "idle_pixel_values" in batch:
                # The original sends a black image along, so that AdamW goes on moving the projector
                # (its gradient is zero, not none) and no process waits for a missing gradient.
                idle = self.tuner.image_features(self.inner, batch["idle_pixel_values"])
            inputs = {name: v for name, v in batch.items() if name not in _NOT_FOR_THE_MODEL}
            hidden = self.tuner.hidden_states(self.inner, inputs)
            head: Any = self.inner.get_submodule(self.parts.output_head)
            rows = self.parts.vocabulary_size
            bias = getattr(head, "bias", None)
            loss = chunked_cross_entropy(
                hidden.flatten(0, 1)[batch["predicting"]],
                head.weight[:rows],
                None if bias is None else bias[:rows],
                batch["targets"],
                chunk=self._chunk,
            )
            if idle is not None:
                loss = loss + 0.0 * idle.float().sum()
        return loss
