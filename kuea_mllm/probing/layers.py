"""How alike the layers of several models are: linear CKA, from one pass over the images.

Every batch of images gives an unbiased estimate of the HSIC of every pair of layers (Song et al.
2012; in batches as of Nguyen et al. 2021), and only these numbers are kept. Memory thus depends on
the batch and not on the number of images, and a small batch does not make wide layers look alike,
as the plain (biased) formula of `diagnostics.linear_cka` would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.teachers.teacher import Teacher
from kuea_mllm.towers.model.encode import TowerEncoder

LEAST_IMAGES = 4
# A representation that varies less than this, in its mean square, is constant but for rounding.
_CONSTANT = 1e-10


class StreamedCKA:
    """Linear CKA between all pairs of layers, a batch of images at a time."""

    def __init__(self) -> None:
        self._hsic: Tensor | None = None
        self.images = 0

    @torch.no_grad()
    def add(self, layers: Sequence[Tensor]) -> None:
        """Take in one batch.

        Args:
            layers: Features of the same images in every layer, (n, width) each; n is at least 4.

        Raises:
            ValueError: If the numbers of images differ or are below 4, or of layers change.
        """
        count = len(layers[0])
        if count < LEAST_IMAGES or any(len(each) != count or each.ndim != 2 for each in layers):
            raise ValueError(f"a batch needs {LEAST_IMAGES} images or more in every layer")
        grams = torch.stack([_gram(features) for features in layers])  # (layers, n, n)
        found = count * _unbiased_hsic(grams)
        if self._hsic is not None and self._hsic.shape != found.shape:
            raise ValueError("the number of layers changed")
        self._hsic = found if self._hsic is None else self._hsic + found
        self.images += count

    def matrix(self) -> Tensor:
        """Return the CKA of every pair of layers, (layers, layers), float64.

        One for layers that are equal up to rotation and scale, about zero for unrelated ones (the
        estimate may fall slightly below), zero where a layer is constant.

        Raises:
            ValueError: If nothing was taken in.
        """
        if self._hsic is None:
            raise ValueError("no images were compared")
        own = self._hsic.diagonal().clamp_min(0.0)
        scale = (own[:, None] * own[None, :]).sqrt()
        return torch.where(scale > 0, self._hsic / scale.clamp_min(1e-300), 0.0)


@dataclass(frozen=True)
class LayeredModel:
    """A model whose layers can be read.

    Attributes:
        name: Such as "original".
        states: Pixels in [0, 1] to the tokens of every layer: the input of the first block, then
            the output of each, (n, tokens, width).
        prefix: Tokens before the patches.
    """

    name: str
    states: Callable[[Tensor], Sequence[Tensor]]
    prefix: int

    def pooled(self, pixels01: Tensor) -> list[Tensor]:
        """Return the mean patch token of every layer, (n, width)."""
        return [tokens[:, self.prefix :].float().mean(1) for tokens in self.states(pixels01)]


def layered_tower(name: str, encoder: TowerEncoder) -> LayeredModel:
    """Describe a tower by its layers."""
    return LayeredModel(name, encoder.hidden_states, encoder.spec.prefix_tokens)


def layered_teacher(name: str, teacher: Teacher, pixels01: Tensor) -> LayeredModel:
    """Describe a teacher by its layers: those of the longest row of equal blocks in it.

    Args:
        name: What to call it.
        teacher: The model.
        pixels01: Any image in [0, 1], (1, 3, side, side), to find out what its blocks give.

    Raises:
        TowerError: If its blocks do not give one token per patch.
    """
    blocks = _find_blocks(teacher.model)

    def states(pixels: Tensor) -> Sequence[Tensor]:
        return _catch(blocks, lambda: teacher(pixels))

    cells = (teacher.grid or 0) ** 2
    shapes = {tuple(tokens.shape[:2]) if tokens.ndim == 3 else () for tokens in states(pixels01)}
    counts = {shape[1] for shape in shapes if shape}
    if not blocks or not cells or () in shapes or len(counts) != 1 or min(counts) < cells:
        raise TowerError(
            f"teacher {teacher.source} ({teacher.model_type}) has no row of blocks that give one "
            "token per patch, so its layers cannot be compared.",
            "Give a ViT teacher, or leave out the comparison with --layer-images 0.",
        )
    return LayeredModel(name, states, counts.pop() - cells)


@torch.inference_mode()
def compare_layers(
    models: Sequence[LayeredModel], batches: Iterable[Tensor]
) -> tuple[list[tuple[str, int]], Tensor, int]:
    """Compare all layers of all models on the same images.

    Args:
        models: The models, each on the device of the batches.
        batches: Pixels in [0, 1], (n, 3, side, side); a last batch of fewer than 4 is left out.

    Returns:
        Model and layer of every row, the CKA matrix, and the number of images it is made of.
    """
    cka = StreamedCKA()
    names: list[tuple[str, int]] = []
    for pixels in batches:
        if len(pixels) < LEAST_IMAGES:
            continue
        layers: list[Tensor] = []
        names = []
        for model in models:
            found = model.pooled(pixels)
            names += [(model.name, index) for index in range(len(found))]
            layers += found
        cka.add(layers)
    return names, cka.matrix(), cka.images


def _gram(features: Tensor) -> Tensor:
    wide = features.detach().cpu().double()
    centred = wide - wide.mean(0)
    # The estimate does not change by centring, only its rounding does.
    if centred.square().mean() <= _CONSTANT * wide.square().mean():
        centred = torch.zeros_like(centred)
    return (centred @ centred.T).fill_diagonal_(0.0)


def _unbiased_hsic(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC of all pairs of Gram matrices without diagonal, (l, l)."""
    count = grams.shape[1]
    flat = grams.flatten(1)
    rows = grams.sum(2)  # (layers, n)
    totals = rows.sum(1)
    traces = flat @ flat.T
    together = totals[:, None] * totals[None, :] / ((count - 1) * (count - 2))
    crossed = 2.0 / (count - 2) * (rows @ rows.T)
    found: Tensor = (traces + together - crossed) / (count * (count - 3))
    return found


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    rows = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    ]
    return max(rows, key=len, default=[])


def _catch(blocks: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    caught: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        caught.append(args[0] if args else next(iter(kwargs.values())))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        caught.append(output if isinstance(output, Tensor) else output[0])

    if not blocks:
        return caught
    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return caught
