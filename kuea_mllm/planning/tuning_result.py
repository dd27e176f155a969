"""What a plan of a tuning says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kuea_mllm.cards import GIB, Card
from kuea_mllm.planning.result import TOLERANCE, MemoryPart, MemoryPlan


@dataclass(frozen=True)
class TuningHours:
    """How long, and why.

    Attributes:
        computing: Hours of arithmetic.
        exchanging: Hours of traffic between processes that arithmetic does not hide.
        samples_per_second: Of all devices together.
    """

    computing: float
    exchanging: float
    samples_per_second: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.computing + self.exchanging


@dataclass(frozen=True)
class TuningOption:
    """One way to run a recipe.

    Attributes:
        method: In words.
        settings: `KEY=VALUE` texts for `--set`; empty for the recipe as it is.
        gib: Memory of one device.
        hours: Of the training.
        fits: Whether the card has that much.
        reason: What the change costs.
    """

    method: str
    settings: tuple[str, ...]
    gib: float
    hours: float
    fits: bool
    reason: str


@dataclass(frozen=True)
class TuningPlan(MemoryPlan):
    """What a tuning takes on given devices.

    Attributes:
        model: Name of the model.
        card: The device.
        processes: Number of devices.
        method: How the recipe runs it, in words.
        samples: In the training set.
        max_length: Longest row in tokens, which the memory is counted for.
        mean_tokens: Tokens of an average row, which the hours are counted for.
        micro_batch_size: Rows at once on one device.
        batch_size: Rows of one update.
        steps: Optimiser updates.
        frozen: Parameters that do not train, by part.
        trained: Parameters that train, by group.
        lora_modules: Layers with LoRA.
        memory: Parts of one device's memory at the worst moment.
        tflops_per_row: Forward and backward pass of an average row, in 10^12 FLOPs.
        hours: How long.
        checkpoint_bytes: Disk that the checkpoints take.
        adapter_bytes: Disk that the result takes.
        merged_bytes: Disk that a merged model takes.
        options: The ways to run it that were looked at, those that change least first.
        choice: The first of them that fits; None if none does.
        reasons: Why this one, one sentence each.
        assumptions: What the numbers rest on, one sentence each.
    """

    model: str
    card: Card
    processes: int
    method: str
    samples: int
    max_length: int
    mean_tokens: int
    micro_batch_size: int
    batch_size: int
    steps: int
    frozen: dict[str, int]
    trained: dict[str, int]
    lora_modules: int
    memory: tuple[MemoryPart, ...]
    tflops_per_row: dict[str, float]
    hours: TuningHours
    checkpoint_bytes: int
    adapter_bytes: int
    merged_bytes: int
    assumptions: tuple[str, ...]
    options: tuple[TuningOption, ...] = ()
    choice: TuningOption | None = None
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self._with_totals(asdict(self))


def check_tuning_memory(plan: TuningPlan, device_total_bytes: int) -> None:
    """Refuse a tuning that clearly needs more memory than the device has, before it loads anything.

    Up to `TOLERANCE` above it passes: the count is on the safe side.

    Args:
        plan: From `plan_tuning`; on whatever card, only its memory is read.
        device_total_bytes: What the device has.

    Raises:
        UserError: With the largest parts, and the settings under which it would fit.
    """
    if plan.memory_bytes <= TOLERANCE * device_total_bytes:
        return
    ways = [
        f"{' '.join(f'--set {s}' for s in option.settings)} ({option.gib:.1f} GiB)"
        for option in plan.options
        if option.settings and option.gib * GIB <= device_total_bytes
    ]
    advice = f"It would fit with {', or '.join(ways)}." if ways else "No setting here makes it fit."
    raise plan.too_large(
        f"tuning {plan.model}",
        device_total_bytes,
        f"{advice} runtime.check_memory=false starts it all the same.",
    )
