"""Measures of how far an aligned tower moved and how alike two representations are."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_drift(student: Tensor, original: Tensor) -> dict[str, float]:
    """Measure how far pooled embeddings moved away from the original tower's.

    Proposition 3.2 of KUEA: if an embedding moves by at most lambda, its cosine to *any* other
    vector (a text embedding, say) changes by at most `2 lambda / max(|student|, |original|)`.

    Args:
        student: Embeddings of the trained tower, (n, width), not normalised.
        original: Embeddings of the original tower for the same images, (n, width).

    Returns:
        `distance_mean`, `distance_max` (L2), `cosine_mean` (in [-1, 1]), `bound_mean` and
        `bound_max` (the bound above, per image with its own lambda).

    Raises:
        ValueError: If the shapes differ or there is no image.
    """
    student, original = _as_matrices(student, original)
    distance = (student - original).norm(dim=1)  # (n,)
    student_norm, original_norm = student.norm(dim=1), original.norm(dim=1)
    tiny = torch.finfo(student.dtype).tiny
    cosine = (student * original).sum(1) / (student_norm * original_norm).clamp_min(tiny)
    bound = 2 * distance / torch.maximum(student_norm, original_norm).clamp_min(tiny)
    return {
        "distance_mean": float(distance.mean()),
        "distance_max": float(distance.max()),
        "cosine_mean": float(cosine.mean()),
        "bound_mean": float(bound.mean()),
        "bound_max": float(bound.max()),
    }


def relative_token_drift(a: Tensor, b: Tensor) -> float:
    """Return `|a - b| / |b|` over all tokens (Frobenius norms): 0 means unchanged.

    Proposition 3.2 bounds the pooled embedding only; the patch tokens that an MLLM reads can drift
    freely under it, so they are measured on their own.

    Args:
        a: Tokens of the trained tower, any shape.
        b: Tokens of the original tower, the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    drift = TokenDrift()
    drift.add(a, b)
    return drift.relative()


class TokenDrift:
    """`relative_token_drift` of more tokens than fit into memory, a batch at a time."""

    def __init__(self) -> None:
        # Python numbers would cost a device sync for each batch.
        self._moved: Tensor | None = None
        self._reference: Tensor | None = None

    @torch.no_grad()
    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in one batch; see `relative_token_drift`.

        Raises:
            ValueError: If the shapes differ.
        """
        if a.shape != b.shape:
            raise ValueError(
                f"tokens must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
            )
        reference = _wide(b)
        moved, size = (_wide(a) - reference).square().sum(), reference.square().sum()
        self._moved = moved if self._moved is None else self._moved + moved
        self._reference = size if self._reference is None else self._reference + size

    def relative(self) -> float:
        """Return the drift of everything taken in.

        Raises:
            ValueError: If nothing was.
        """
        if self._moved is None or self._reference is None:
            raise ValueError("no tokens were compared")
        tiny = torch.finfo(self._reference.dtype).tiny
        return float((self._moved / self._reference.clamp_min(tiny)).sqrt())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same images.

    Kornblith et al. 2019. One for representations that are equal up to rotation and scale.

    Args:
        x: Features, (n, p).
        y: Features, (n, q); the widths may differ.

    Returns:
        A number in [0, 1]; zero if one representation is constant.

    Raises:
        ValueError: If the numbers of rows differ or are below 2.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"features must be (n, p) and (n, q), not {x.shape} and {y.shape}")
    with torch.no_grad():
        x, y = (_wide(t) - _wide(t).mean(0) for t in (x, y))
        cross = (x.T @ y).square().sum()
        norm = (x.T @ x).norm() * (y.T @ y).norm()
        return float(cross / norm) if float(norm) > 0 else 0.0


def _as_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(
            f"embeddings must be (n, width) each, not {tuple(a.shape)}, {tuple(b.shape)}"
        )
    return _wide(a), _wide(b)


def _wide(x: Tensor) -> Tensor:
    # Apple's GPU has no float64; its numbers are good to about six digits.
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
