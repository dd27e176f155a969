"""Stand-ins for what a pass reads of weights and token ids, where there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class UnpackedLinear(nn.Linear):
    """A frozen layer whose weights are unpacked for every product, as bitsandbytes does it."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer; keeps nothing for the backward pass."""
        product: Any = _Unpacked.apply(input.to(self.weight.dtype), self.weight)
        output: Tensor = product if self.bias is None else product + self.bias
        return output


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return functional.linear(input, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ torch.empty_like(ctx.weight), None


class ImageTokens(TorchFunctionMode):
    """Answer how many image tokens there are, which tensors without data cannot.

    Args:
        rows: Rows of the batch.
        each: Image tokens in each of them.
    """

    def __init__(self, rows: int, each: int) -> None:
        super().__init__()
        self._rows, self._each = rows, each

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace reading a total, and the number of a row."""
        if func is Tensor.__int__:
            return self._rows * self._each
        if func is Tensor.item:  # `tolist` of a tensor without data comes down to it
            return self._each
        return func(*args, **(kwargs or {}))


def without_data(model: nn.Module) -> None:
    """Replace meta tensors by fake ones, which autocast and fused attention know."""
    made: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                empty = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
