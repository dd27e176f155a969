"""Count what one forward and backward pass takes: FLOPs, and bytes alive at every moment.

Counting works on real tensors and on fake ones. A fake tensor is a meta tensor (shape and dtype, no
data) that claims to lie on the CPU: the plain meta device is unknown to autocast, and picks an
attention that no GPU would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class PassCounts:
    """What one pass took; bytes do not contain parameters, inputs and parameter gradients.

    Attributes:
        forward_flops: FLOPs of the forward pass (a multiply-add is two).
        backward_flops: FLOPs of the backward pass, recomputation included; 0 without one.
        kept_bytes: Alive when the forward pass has ended: what backward needs.
        weight_copy_bytes: The part of it that are parameters in another dtype (autocast).
        forward_peak_bytes: Alive at the worst moment of the forward pass.
        backward_peak_bytes: Alive at the worst moment of the backward pass.
    """

    forward_flops: int
    backward_flops: int
    kept_bytes: int
    weight_copy_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Alive at the worst moment of both passes."""
        return max(self.forward_peak_bytes, self.backward_peak_bytes)

    @property
    def activation_bytes(self) -> int:
        """What backward needs apart from copies of weights."""
        return self.kept_bytes - self.weight_copy_bytes

    @property
    def working_bytes(self) -> int:
        """What the worst moment takes above the end of the forward pass."""
        return max(0, self.peak_bytes - self.kept_bytes)


class FusedKernels(TorchFunctionMode):
    """Take the kernels of GPUs for attention without a mask and for dropout.

    The fused attention keeps query, key, value, output and one number per row for backward, never
    the matrix of scores. On fake tensors PyTorch would choose the unfused one. The CPU's fused
    kernel keeps the same tensors as those of CUDA. Dropout keeps one byte per number on a GPU, and
    as many as its input has on the CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the two functions; pass on all others."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and not _has_mask(args[0], kwargs):
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args[:3], scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record when every storage comes and goes.

    Args:
        outside: Tensors that are not to be counted, parameters among them.
    """

    def __init__(self, outside: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []  # (storage number, bytes; negative when freed)
        self.copies_of_weights: set[int] = set()
        self._numbers = WeakIdKeyDictionary()
        self._outside, self._parameters = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for tensor in outside:
            self._outside[tensor.untyped_storage()] = True
            if isinstance(tensor, nn.Parameter):
                self._parameters[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note the storages it made."""
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default
        is_of_weight = is_cast and args[0].untyped_storage() in self._parameters
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value, is_of_weight=is_of_weight)
        return result

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, None if it was not made under this mode."""
        found: int | None = self._numbers.get(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return found

    def alive(self) -> int:
        """Return the bytes alive now."""
        return sum(size for _, size in self.events)

    def alive_copies_of_weights(self) -> int:
        """Return the bytes of weight copies alive now."""
        return sum(size for number, size in self.events if number in self.copies_of_weights)

    def peak(self, *, without: set[int], begin: int = 0, end: int | None = None) -> int:
        """Return the most bytes that were alive at once, some storages left out.

        Args:
            without: Numbers of the storages to leave out.
            begin: First event of the stretch that is looked at.
            end: Event behind it.
        """
        counted = [0 if number in without else size for number, size in self.events[:end]]
        now = most = sum(counted[:begin])
        for size in counted[begin:]:
            now += size
            most = max(most, now)
        return most

    def _note(self, tensor: Tensor, *, is_of_weight: bool) -> None:
        storage = tensor.untyped_storage()
        if storage in self._numbers or storage in self._outside:
            return
        number, size = len(self.events), storage.nbytes()
        self._numbers[storage] = number
        self.events.append((number, size))
        if is_of_weight:
            self.copies_of_weights.add(number)
        weakref.finalize(storage, self.events.append, (number, -size)).atexit = False


def count_pass(
    model: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[[], Tensor],
    *,
    precision: str,
    only: Literal["flops", "bytes"] | None = None,
) -> PassCounts:
    """Run forward and backward once and count.

    Args:
        model: Holds the parameters, those of the loss included.
        inputs: Tensors that exist before the pass, such as pixels and targets.
        loss: Runs the forward pass and returns a 0-d tensor.
        precision: "fp32", or "bf16" for autocast.
        only: What to count, the rest being 0; None for all, which takes twice as long.
    """
    # Two passes: the FLOP counter's module tracking keeps tensors alive that would be gone.
    forward_flops = backward_flops = 0
    if only != "bytes":
        forward_flops, backward_flops = _count_flops(model, loss, precision)
    if only == "flops":
        return PassCounts(forward_flops, backward_flops, 0, 0, 0, 0)
    parameters = list(model.parameters())
    live = LiveBytes([*parameters, *model.buffers(), *inputs])
    with FusedKernels(), live:
        with _autocast(precision):
            total = loss()
        kept, copies = live.alive(), live.alive_copies_of_weights()
        turn = len(live.events)
        _backward(total)
    found = {live.number(p.grad) for p in parameters if p.grad is not None}
    gradients = {number for number in found if number is not None}
    return PassCounts(
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        kept_bytes=kept,
        weight_copy_bytes=copies,
        forward_peak_bytes=live.peak(without=gradients, end=turn),
        backward_peak_bytes=live.peak(without=gradients, begin=turn),
    )


def count_saved_bytes(model: nn.Module, loss: Callable[[], Tensor], *, precision: str) -> int:
    """Return the bytes that autograd saves for backward, parameters left out.

    An independent way to `PassCounts.kept_bytes`: what saved-tensor hooks see, each storage once.
    Inputs that are saved are counted here, and the loss itself there.
    """
    seen = WeakIdKeyDictionary()
    for parameter in model.parameters():
        seen[parameter.untyped_storage()] = True
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in seen:
            seen[storage] = True
            sizes.append(storage.nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FusedKernels(), _autocast(precision), hooks:
        total = loss()
    del total
    return sum(sizes)


def count_inference_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of a call without gradient."""
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), FusedKernels(), flops:
        run()
    return flops.get_total_flops()


def count_inference_peak(model: nn.Module, pixels: Tensor, run: Callable[[], object]) -> int:
    """Return the most bytes alive at once in a call without gradient, model and pixels left out."""
    live = LiveBytes([*model.parameters(), *model.buffers(), pixels])
    with torch.no_grad(), FusedKernels(), live:
        run()
    return live.peak(without=set())


def _has_mask(query: Tensor, kwargs: dict[str, Any]) -> bool:
    mask = kwargs.get("attn_mask")
    # For tensors without data transformers writes out the causal mask that a GPU's kernel knows.
    is_causal = (
        isinstance(query, FakeTensor)
        and mask is not None
        and mask.dtype == torch.bool
        and mask.shape[-1] == mask.shape[-2] == query.shape[-2]
    )
    return mask is not None and not is_causal


def _dropout(
    values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    dropped: Tensor = torch.native_dropout(values, p, train=True)[0] if training and p else values
    return dropped


def _count_flops(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> tuple[int, int]:
    flops = FlopCounterMode(display=False)
    with FusedKernels(), flops:
        with _autocast(precision):
            total = loss()
        forward_flops = flops.get_total_flops()
        _backward(total)
    model.zero_grad(set_to_none=True)
    return forward_flops, flops.get_total_flops() - forward_flops


def _backward(total: Tensor) -> None:
    total.backward()  # type: ignore[no-untyped-call]


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
