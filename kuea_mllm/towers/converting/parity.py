"""Whether two forms of one tower compute the same: embedding, penultimate and last patch tokens.

Each form runs in the library that it belongs to (see `reading.own_library`), on the same probe
images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.reading.own_library import OwnModel, open_in_own_library
from kuea_mllm.towers.spec import TowerSpec

# Two libraries that run the same float32 weights differ by the order of their sums: by 6e-7 of the
# norm on a random ViT-L/14, open_clip against transformers. QuickGELU in place of GELU is
# 2e-3 or more on the tiny towers of the tests, and 1e-2 on the mini world's CLIP; the tanh form of
# GELU in place of the exact one, 1.2e-4 to 1.8e-4 there, is the smallest mistake that is caught.
BOUND = 1e-4
PROBES = 4


@dataclass(frozen=True)
class TowerOutputs:
    """What a tower gives on some images; patch tokens without class token and final norm.

    Attributes:
        embedding: Pooled embedding, (n, embedding_width); None for a CLIP tower without projection.
        penultimate: Output of the block before the last, (n, patches, width).
        last: Output of the last block, (n, patches, width).
        library: The library that computed it.
    """

    embedding: Tensor | None
    penultimate: Tensor
    last: Tensor
    library: str = "transformers"


@dataclass(frozen=True)
class ParityRow:
    """How far two forms are apart in one quantity.

    Attributes:
        quantity: "embedding", "penultimate patch tokens" or "last patch tokens".
        max_abs: Largest difference of two numbers.
        relative_l2: Norm of the difference over the norm of the first form's values.
    """

    quantity: str
    max_abs: float
    relative_l2: float


@dataclass(frozen=True)
class ParityReport:
    """The comparison of two forms of one tower.

    Attributes:
        first: What was compared, and in which library it ran.
        second: With what.
        images: Number of probe images.
        rows: One for each quantity.
        bound: Largest relative error that counts as the same tower.
    """

    first: str
    second: str
    images: int
    rows: tuple[ParityRow, ...]
    bound: float = BOUND

    @property
    def is_same(self) -> bool:
        """Whether every quantity is within the bound (and a number at all)."""
        return all(row.relative_l2 <= self.bound for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "first": self.first,
            "second": self.second,
            "images": self.images,
            "bound": self.bound,
            "rows": [
                {
                    "quantity": row.quantity,
                    "max_abs": _json_number(row.max_abs),
                    "relative_l2": _json_number(row.relative_l2),
                }
                for row in self.rows
            ],
        }

    def require_same(self) -> None:
        """Raise an error if the two forms differ.

        Raises:
            TowerError: Naming the quantity that differs most.
        """
        if self.is_same:
            return
        worst = max(self.rows, key=lambda r: r.relative_l2 if r.relative_l2 >= 0 else math.inf)
        if not math.isfinite(worst.relative_l2):
            raise TowerError(
                f"{self.first} and {self.second} cannot be compared: values of the "
                f"{worst.quantity} are NaN or infinite.",
                "Nothing was written. `kuea-mllm convert --inspect` names the tensor if it is the "
                "weights that hold them.",
            )
        raise TowerError(
            f"{self.first} and {self.second} do not compute the same: they differ in the "
            f"{worst.quantity} by {worst.relative_l2:.2g} of the norm, at most {self.bound:g} is "
            "allowed.",
            "Nothing was written. Activation, heads and epsilon are the usual reasons; look at "
            "both with `kuea-mllm convert --inspect`.",
        )


def compare_outputs(
    first: TowerOutputs, second: TowerOutputs, *, names: tuple[str, str], bound: float = BOUND
) -> ParityReport:
    """Compare what two forms of one tower give on the same images.

    Args:
        first: The form that errors are relative to.
        second: The other.
        names: What to call the two.
        bound: Largest relative error that counts as the same.

    Raises:
        TowerError: If shapes differ, or only one of the two has an embedding.
    """
    pairs = {
        "embedding": (first.embedding, second.embedding),
        "penultimate patch tokens": (first.penultimate, second.penultimate),
        "last patch tokens": (first.last, second.last),
    }
    rows = []
    for quantity, (one, other) in pairs.items():
        if one is None and other is None:
            continue
        if one is None or other is None or one.shape != other.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (one, other)]
            raise TowerError(
                f"{names[0]} and {names[1]} do not compute the same: {quantity} of shape "
                f"{shapes[0]} and {shapes[1]}."
            )
        difference = (other.double() - one.double()).flatten()
        scale = float(one.double().norm()) or 1.0
        rows.append(
            ParityRow(quantity, float(difference.abs().max()), float(difference.norm()) / scale)
        )
    shown = tuple(
        f"{name} in {outputs.library}" for name, outputs in zip(names, (first, second), strict=True)
    )
    return ParityReport(shown[0], shown[1], len(first.last), tuple(rows), bound)


def outputs_in_own_library(
    source: Path, *, layout: str, spec: TowerSpec, pixels: Tensor
) -> TowerOutputs:
    """Run the tower of a file or directory in the library that its format belongs to.

    Args:
        source: Where it is on disk.
        layout: A key of `formats.layouts.LAYOUTS`.
        spec: What bare state dicts do not state; mean and deviation where the format states none.
        pixels: Images in [0, 1], (n, 3, image_size, image_size).

    Raises:
        TowerError: If the library does not take the weights.
    """
    return _run(open_in_own_library(source, layout=layout, spec=spec), spec, pixels)


def outputs_of_tower(tower: Tower, pixels: Tensor) -> TowerOutputs:
    """Run a tower in memory, whatever dtype it is stored in; see `outputs_in_own_library`."""
    state = tower.canonical_state()
    is_wide = all(t.dtype == torch.float32 for t in state.values())
    model: Any = tower.model
    if not is_wide:
        model = build_model(tower.spec, state, where=tower.source, dtype=torch.float32)
    body = getattr(model, "vision_model", model)

    def embed(given: Tensor) -> Tensor | None:
        output = model(pixel_values=given)
        if tower.spec.family == "siglip":
            pooled: Tensor = output.pooler_output
            return pooled
        embedding: Tensor | None = getattr(output, "image_embeds", None)
        return embedding

    own = OwnModel("transformers", model, embed, body.encoder.layers[-1], tower.spec.prefix_tokens)
    return _run(own, tower.spec, pixels)


@torch.no_grad()
def _run(own: OwnModel, spec: TowerSpec, pixels: Tensor) -> TowerOutputs:
    given = normalise(pixels.to(own.dtype), own.mean or spec.mean, own.std or spec.std)
    with _tokens_around(own.last_block) as caught:
        embedding = own.embed(given)
    before, after = (tokens[:, own.prefix_tokens :] for tokens in (caught["in"], caught["out"]))
    return TowerOutputs(embedding, before, after, own.library)


@contextmanager
def _tokens_around(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Catch what goes into the last block (the penultimate output) and what comes out of it.

    Taken from the block: what libraries return as tokens has been through the final norm in some
    versions and not in others.
    """
    caught: dict[str, Tensor] = {}

    def hook(module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        del module
        caught["in"] = inputs[0] if inputs else options["hidden_states"]
        caught["out"] = output[0] if isinstance(output, tuple) else output

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
