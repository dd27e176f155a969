"""The projection baseline: leave the tower alone and map the teacher into CLIP space.

The paper reports it (Table 1) without saying how the map was found, and the released code does not
contain it. Here it is the best linear map there is: least squares in closed form, so that nothing
about an optimiser can be blamed for what the baseline scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kuea_mllm.errors import TowerError


@dataclass(frozen=True)
class Projection:
    """A linear map from teacher to CLIP embeddings, without bias (as equation 18 has it).

    Attributes:
        weight: (CLIP width, teacher width), float32.
        images: How many images it was fitted on.
        residual: Mean squared distance that is left, over that of predicting zero; in [0, 1].
    """

    weight: Tensor
    images: int
    residual: float


def fit_projection(pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float = 1e-6) -> Projection:
    """Fit the map by least squares, a batch at a time.

    Args:
        pairs: Batches of teacher embeddings (n, t) and original CLIP embeddings (n, d).
        ridge: Penalty on the squared weights, in units of the mean squared teacher coordinate, so
            that it does not depend on the number of images.

    Raises:
        TowerError: If an embedding is not finite.
        ValueError: If there is no image.
    """
    gram = cross = None
    total, images = 0.0, 0
    for teacher, original in pairs:
        y, o = teacher.double().cpu(), original.double().cpu()
        if not (y.isfinite().all() and o.isfinite().all()):
            raise TowerError(
                "an embedding of teacher or student is not finite.",
                "Run `kuea-mllm doctor --images` on the images, or use runtime.precision=fp32.",
            )
        gram = y.T @ y if gram is None else gram + y.T @ y
        cross = y.T @ o if cross is None else cross + y.T @ o
        total += float(o.square().sum())
        images += len(y)
    if gram is None or cross is None:
        raise ValueError("a projection cannot be fitted to no image")
    penalty = ridge * gram.diagonal().mean()
    solved = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), cross)
    # |O - Y W|^2 = |O|^2 - 2 <O, Y W> + |Y W|^2, from the sums that are kept.
    left = total - 2 * float((cross * solved).sum()) + float((solved * (gram @ solved)).sum())
    return Projection(solved.T.float().contiguous(), images, max(left, 0.0) / max(total, 1e-300))
