"""Forward and backward of one update whose loss is over the whole batch.

The kernel loss is over *pairs*, so it cannot be averaged over processes or micro-batches. It needs
nothing but the pooled embeddings, though, and those are small. Every process therefore gathers all
of them, computes the same loss, and takes the gradient with respect to the embeddings; what flows
back into the tower is `sum(embedding * gradient)`, whose derivative is exactly that of the loss.
One process, N processes and a batch cut into micro-batches (Gao et al. 2021, "gradient cache") are
then the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from kuea_mllm.alignment.targets import Targets, TargetSource
from kuea_mllm.features import Features
from kuea_mllm.objectives import LossTerms, Objective, widened
from kuea_mllm.training.distributed import gather_objects, gather_rows, rank, world_size

Context = Callable[[], AbstractContextManager[object]]


class WholeBatchStep:
    """Computes loss and gradients of one update.

    Args:
        objective: Evaluated on the whole batch.
        targets: Gives the frozen side.
        autocast: Context in which towers run.
        backward: Called with a 0-d tensor; accumulates gradients.
        no_sync: Context in which a wrapped model does not exchange gradients.
        micro_batch_size: Images embedded at once; None takes all images of this process. Smaller
            pieces cost one more forward pass and change nothing but rounding.
    """

    def __init__(
        self,
        objective: Objective,
        targets: TargetSource,
        *,
        autocast: Context,
        backward: Callable[[Tensor], None],
        no_sync: Callable[[nn.Module], AbstractContextManager[object]],
        micro_batch_size: int | None = None,
    ) -> None:
        self._objective = objective
        self._targets = targets
        self._autocast = autocast
        self._backward = backward
        self._no_sync = no_sync
        self._micro_batch_size = micro_batch_size
        self._shares_are_equal = False

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossTerms:
        """Accumulate the gradients of one batch.

        Args:
            model: `AlignmentModel`, possibly wrapped for several processes.
            batch: This process's share of the images; see `TargetSource`.

        Returns:
            Total and terms, detached. Pooled terms are those of the whole batch, patch terms the
            mean over this process's images.

        Raises:
            ValueError: If processes have different numbers of images.
        """
        self._require_equal_shares(len(batch["pixels"]))
        pieces = self._pieces(batch)
        # With one piece the first pass keeps its graph, and there is no second one.
        is_whole = len(pieces) == 1
        reads_patches = self._objective.reads_patches
        targets: list[Targets] = []
        features: list[Features] = []
        for piece in pieces:
            with self._autocast():
                targets.append(self._targets(piece))
                with torch.set_grad_enabled(is_whole):
                    features.append(model(piece["pixels"], reads_patches and is_whole))
        loss, gradients = self._pooled_loss(features, targets)
        totals, terms = [loss.total.detach()], dict(loss.terms)
        for position, piece in enumerate(pieces):
            is_last = position == len(pieces) - 1
            with nullcontext() if is_last else self._no_sync(model):
                if not is_whole:
                    with self._autocast():
                        features[position] = model(piece["pixels"], reads_patches)
                student = features[position]
                surrogate = (widened(student.pooled) * gradients.embeddings[position]).sum()
                if reads_patches:
                    share = len(student.pooled) / len(batch["pixels"])
                    with self._autocast():
                        patch_loss = self._patch_loss(student, targets[position])
                    surrogate = surrogate + share * patch_loss.total
                    totals.append(share * patch_loss.total.detach())
                    for name, value in patch_loss.terms.items():
                        terms[name] = terms.get(name, 0) + share * value
                if is_last:
                    surrogate = surrogate + gradients.of_parameters(self._objective)
                self._backward(surrogate)
        return LossTerms(torch.stack(totals).sum(), terms)

    def _require_equal_shares(self, size: int) -> None:
        # Once: it costs a round trip, and sizes come from a setting.
        if self._shares_are_equal:
            return
        sizes = gather_objects(size)
        if len(set(sizes)) > 1:
            raise ValueError(f"processes have {sizes} images of one batch; shares must be equal")
        self._shares_are_equal = True

    def _pieces(self, batch: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        size = len(batch["pixels"])
        step = min(self._micro_batch_size or size, size)
        if step == size:
            return [batch]
        return [
            {name: values[start : start + step] for name, values in batch.items()}
            for start in range(0, size, step)
        ]

    def _pooled_loss(
        self, features: list[Features], targets: list[Targets]
    ) -> tuple[LossTerms, _Gradients]:
        sizes = [len(piece.pooled) for piece in features]
        everyone = gather_rows(torch.cat([widened(piece.pooled.detach()) for piece in features]))
        everyone = everyone.requires_grad_()
        with self._autocast():
            loss = self._objective.pooled(everyone, _gathered(targets))
        parameters = [p for p in self._objective.parameters() if p.requires_grad]
        if not loss.total.requires_grad:  # patch terms only
            nothing = [torch.zeros_like(piece.pooled) for piece in features]
            return loss, _Gradients(nothing, {})
        found = torch.autograd.grad(loss.total, [everyone, *parameters], allow_unused=True)
        share = sum(sizes)
        # Wrapped models average gradients over processes; every process holds all of this loss.
        own = found[0][rank() * share : (rank() + 1) * share] * world_size()
        of_parameters = {
            id(parameter): gradient
            for parameter, gradient in zip(parameters, found[1:], strict=True)
            if gradient is not None
        }
        return loss, _Gradients(list(torch.split(own, sizes)), of_parameters)

    def _patch_loss(self, student: Features, targets: Targets) -> LossTerms:
        if student.patches is None:
            raise ValueError("the objective reads patch tokens, the student gave none")
        return self._objective.patches(student.patches, targets)


class _Gradients:
    """Gradients of the pooled loss: for each piece of embeddings, and for the objective."""

    def __init__(self, embeddings: list[Tensor], parameters: dict[int, Tensor]) -> None:
        self.embeddings = embeddings
        self._parameters = parameters

    def of_parameters(self, objective: Objective) -> Tensor | float:
        """Return a 0-d tensor whose gradient for each parameter is the one that was found."""
        parts = [
            (parameter * self._parameters[id(parameter)]).sum()
            for parameter in objective.parameters()
            if id(parameter) in self._parameters
        ]
        return torch.stack(parts).sum() if parts else 0.0


def _gathered(pieces: list[Targets]) -> Targets:
    """Return the pooled targets of all processes; patch tokens stay where they are."""

    def join(features: list[Features]) -> Features:
        return Features(gather_rows(torch.cat([widened(piece.pooled) for piece in features])))

    count = len(pieces[0].teachers)
    return Targets(
        teachers=tuple(join([piece.teachers[k] for piece in pieces]) for k in range(count)),
        original=join([piece.original for piece in pieces]),
    )
