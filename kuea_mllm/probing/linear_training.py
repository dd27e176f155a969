"""Training of linear probes by the protocol of CLIP_benchmark.

Training has many small steps on features that fit on the device. So they stay there, only positions
come from a loader, and classifiers that differ in weight decay are trained side by side as one
matrix product. `transformers.Trainer` would cost more than the steps, and has one weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize
from torch.utils.data import DataLoader

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.datasets.dataset import ProbeDataset

WEIGHT_DECAYS: tuple[float, ...] = tuple(np.logspace(-6, 2, num=97).tolist())
"""What the search chooses from."""
COARSE = tuple(range(0, 97, 16))
"""Positions of the seven weight decays that it starts with."""
SPANS = (8, 4, 2, 1)
"""How far the two neighbours lie that are compared with the best one so far, round by round."""
BLOCK = 65536
"""Images that are classified at once."""


@dataclass(frozen=True)
class LinearSettings:
    """How a linear probe is trained; the defaults are the protocol's.

    Attributes:
        lr: First learning rate; follows half a cosine to 0, without warm-up.
        epochs: Passes over the images.
        batch_size: Images in one step; the last batch of an epoch may be smaller.
        seed: Of the first weights and of the order.
        device: Where features and classifiers are. Always float32.
    """

    lr: float = 0.1
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Labelled:
    """Unit embeddings, (images, width), float32, and the class of each, (images,)."""

    features: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls, features: NDArray[np.float32], dataset: ProbeDataset, device: str = "cpu"
    ) -> Labelled:
        """Take a data set and its embeddings, which need not be normalised.

        Raises:
            DataError: If there are no labels, or not as many as embeddings.
            TowerError: If an embedding is not finite; names the image.
        """
        labels = dataset.require_labels()
        if len(features) != len(labels):
            raise DataError(
                f"data set {dataset.name} has {len(labels)} images, but {len(features)} embeddings."
            )
        units = torch.empty(features.shape, dtype=torch.float32, device=device)
        for start in range(0, len(features), BLOCK):
            # Copied: the rows are mapped read-only, which torch warns about. A block at a time:
            # several copies of all rows would not fit where one does.
            rows = torch.from_numpy(np.array(features[start : start + BLOCK], dtype=np.float32))
            is_finite = rows.isfinite().all(1)
            if not is_finite.all():
                bad = start + int((~is_finite).nonzero()[0])
                raise TowerError(
                    f"the embedding of image {dataset.images.name(bad)} holds NaN or infinity.",
                    "Compute in float32 (--dtype float32); if it stays, the weights are damaged.",
                )
            units[start : start + BLOCK] = normalize(rows, dim=-1)
        return cls(units, torch.from_numpy(labels).to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(
            torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels])
        )


@dataclass(frozen=True, eq=False)
class Classifiers:
    """Linear layers side by side: weights (k, classes, width) and biases (k, classes)."""

    weight: Tensor
    bias: Tensor

    @property
    def is_finite(self) -> Tensor:
        """Which of them training has not driven to infinity, (k,)."""
        return self.weight.isfinite().all((1, 2)) & self.bias.isfinite().all(1)

    def logits(self, features: Tensor) -> Tensor:
        """Return what each says of features (n, width): (k, n, classes)."""
        flat = linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.view(len(features), *self.bias.shape).transpose(0, 1)

    def accuracies(self, data: Labelled) -> Tensor:
        """Return the share of right answers of each, (k,); 0 for one that is not finite."""
        right = torch.zeros(len(self.bias), dtype=torch.int64, device=data.labels.device)
        for start in range(0, len(data), BLOCK):
            part = slice(start, start + BLOCK)
            guesses = self.logits(data.features[part]).argmax(2)
            right += (guesses == data.labels[part]).sum(1)
        # On the CPU, because not every device has float64.
        return right.cpu().double() / len(data) * self.is_finite.cpu()


@dataclass(frozen=True)
class WeightDecaySearch:
    """What the search for a weight decay came to.

    Attributes:
        weight_decay: The best one.
        accuracies: Validation accuracy by weight decay, all that were tried.
    """

    weight_decay: float
    accuracies: dict[float, float]


def split_off(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose a part of the training images for validation, at random.

    Args:
        count: How many training images there are.
        share: Part that is split off, in (0, 1).
        seed: Of the choice.

    Returns:
        Positions of the rest and of the part.

    Raises:
        DataError: If one of them would be empty.
    """
    held = math.floor(count * share)
    if not 0 < held < count:
        raise DataError(f"a share of {share} of {count} images leaves nothing to train or search.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(order[held:]), np.sort(order[:held])


def train_classifiers(
    data: Labelled, classes: int, weight_decays: Sequence[float], how: LinearSettings
) -> Classifiers:
    """Train linear layers that differ in weight decay and in nothing else.

    All begin with the same weights and see the same batches, those of `torch.nn.Linear` and a
    shuffling `DataLoader` after `torch.manual_seed(how.seed)`. None influences another: every
    operation is row by row, the sum of the losses has the gradient of each, and Adam works number
    by number. With a learning rate of 0.1, weight decays above 20 diverge by themselves.

    Args:
        data: Unit embeddings and labels, on `how.device`.
        classes: Number of outputs.
        weight_decays: One for each layer; decoupled, on weights and biases.
        how: See `LinearSettings`.
    """
    # On the CPU whatever the device, so that the first weights are the same everywhere.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        first = torch.nn.Linear(data.features.shape[1], classes)
        orders = [_order(len(data), how.batch_size) for _ in range(how.epochs)]
    copies = len(weight_decays)
    device = data.features.device
    weight = first.weight.detach().to(device).repeat(copies, 1, 1).requires_grad_()
    bias = first.bias.detach().to(device).repeat(copies, 1).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=how.lr)
    layers = Classifiers(weight, bias)
    total = len(orders) * math.ceil(len(data) / how.batch_size)
    rates = [0.5 * (1 + math.cos(math.pi * step / total)) * how.lr for step in range(total)]
    # AdamW's decay, by hand because each layer has its own: (steps, k).
    decays = torch.tensor(rates, dtype=torch.float64)[:, None] * torch.tensor(
        weight_decays, dtype=torch.float64
    )
    factors = (1 - decays).float().to(device)
    batches = (part for order in orders for part in torch.split(order.to(device), how.batch_size))
    for step, positions in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        logits = layers.logits(data.features[positions]).transpose(0, 1)  # (n, k, classes)
        targets = data.labels[positions].repeat_interleave(copies)
        # The mean over the batch for each layer; summed first, so that one layer's gradients are
        # those of the plain mean to the last bit.
        loss = cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(positions)
        torch.autograd.backward(loss)
        if any(weight_decays):
            with torch.no_grad():
                weight.mul_(factors[step, :, None, None])
                bias.mul_(factors[step, :, None])
        optimizer.step()
    return Classifiers(weight.detach(), bias.detach())


def search_weight_decay(
    train: Labelled, validation: Labelled, classes: int, how: LinearSettings
) -> WeightDecaySearch:
    """Search `WEIGHT_DECAYS` for the one with the best validation accuracy.

    Seven coarse points, then four rounds that compare the best so far with a neighbour on either
    side; of equals the smaller wins. Points of a round are trained side by side, and none twice.
    A classifier that diverged counts as always wrong.
    """
    found: dict[int, float] = {}

    def best_of(points: Sequence[int]) -> int:
        new = sorted(set(points) - found.keys())
        if new:
            layers = train_classifiers(train, classes, [WEIGHT_DECAYS[i] for i in new], how)
            found.update(zip(new, layers.accuracies(validation).tolist(), strict=True))
        # As in CLIP_benchmark: the first of the list, unless nothing is ever right.
        return max(points, key=lambda i: found[i]) if any(found[i] for i in points) else 0

    peak = best_of(COARSE)
    for span in SPANS:
        last = len(WEIGHT_DECAYS) - 1
        peak = best_of([max(peak - span, 0), peak, min(peak + span, last)])
    LOGGER.info(
        "linear probe: weight decay %.3g has the best validation accuracy (%.2f) of %d",
        WEIGHT_DECAYS[peak],
        100 * found[peak],
        len(found),
    )
    tried = {WEIGHT_DECAYS[i]: 100 * found[i] for i in sorted(found)}
    return WeightDecaySearch(WEIGHT_DECAYS[peak], tried)


def _order(count: int, batch_size: int) -> Tensor:
    """Return all positions in the order of one epoch, drawn as a DataLoader draws them."""
    positions: Any = range(count)
    loader = DataLoader(positions, batch_size=batch_size, shuffle=True, collate_fn=torch.tensor)
    return torch.cat(list(loader))
