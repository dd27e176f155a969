"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kuea_mllm.cards import GIB, Card
from kuea_mllm.errors import UserError


@dataclass(frozen=True)
class MemoryPart:
    """One line of the memory of a device."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Hours:
    """How long, and why.

    Attributes:
        training: Hours of the steps.
        targets: Hours of filling the target cache once; 0 without one.
        images_per_second: Of all devices together, in training.
        bound: "compute", or "decode" where the decoding processes cannot keep up.
    """

    training: float
    targets: float
    images_per_second: float
    bound: str

    @property
    def total(self) -> float:
        """Both together."""
        return self.training + self.targets


class MemoryPlan:
    """What every plan says of the memory of one device.

    Attributes:
        card: Kind of device.
        memory: Its parts.
        hours: How long the run takes; knows its total.
    """

    card: Card
    memory: tuple[MemoryPart, ...]
    hours: Any

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return sum(part.bytes for part in self.memory)

    @property
    def memory_gib(self) -> float:
        """Memory of one device in GiB."""
        return self.memory_bytes / GIB

    @property
    def fits(self) -> bool:
        """Whether one device has that much."""
        return self.memory_bytes <= self.card.memory_bytes

    def too_large(self, what: str, device_total_bytes: int, remedy: str) -> UserError:
        """Return the refusal of a run that needs more than a device has."""
        largest = sorted(self.memory, key=lambda part: part.bytes, reverse=True)[:3]
        shown = ", ".join(f"{part.name} {part.bytes / GIB:.1f}" for part in largest)
        return UserError(
            f"{what} needs about {self.memory_gib:.1f} GiB per device, the device has "
            f"{device_total_bytes / GIB:.1f} GiB (largest parts in GiB: {shown}).",
            remedy,
        )

    def _with_totals(self, content: dict[str, Any]) -> dict[str, Any]:
        content |= {
            "memory_bytes": self.memory_bytes,
            "memory_gib": round(self.memory_gib, 2),
            "fits": self.fits,
        }
        content["hours"]["total"] = self.hours.total
        return content


@dataclass(frozen=True)
class AlignmentPlan(MemoryPlan):
    """What a run takes on given devices.

    Attributes:
        student: Name of the student.
        teachers: Names of the teachers.
        card: The device.
        processes: Number of devices.
        images_per_device: Share of the batch.
        micro_batch_size: Images embedded at once on one device.
        steps: Optimiser updates.
        images: Images in the training set.
        parameters: Of the student, and of everything that is trained.
        memory: Parts of one device's memory at the worst moment.
        gflops_per_image: By part of the step, in 10^9 FLOPs.
        hours: How long.
        cache_bytes: Disk that the target cache takes; 0 without one.
        checkpoint_bytes: Disk that the checkpoints take.
        assumptions: What the numbers rest on, one sentence each.
    """

    student: str
    teachers: tuple[str, ...]
    card: Card
    processes: int
    images_per_device: int
    micro_batch_size: int
    steps: int
    images: int
    parameters: dict[str, int]
    memory: tuple[MemoryPart, ...]
    gflops_per_image: dict[str, float]
    hours: Hours
    cache_bytes: int
    checkpoint_bytes: int
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self._with_totals(asdict(self))


# The count adds up worst moments of its parts, which need not coincide.
TOLERANCE = 1.1


def check_memory(plan: AlignmentPlan, device_total_bytes: int) -> None:
    """Refuse a run that clearly needs more memory than the device has, before anything is loaded.

    Up to `TOLERANCE` above it passes: the count is on the safe side.

    Raises:
        UserError: With the largest parts and what to change.
    """
    if plan.memory_bytes <= TOLERANCE * device_total_bytes:
        return
    raise plan.too_large(
        "the run",
        device_total_bytes,
        f"Set runtime.micro_batch_size below {plan.micro_batch_size}, runtime.precision=bf16, "
        "targets.cache=true or runtime.gradient_checkpointing=true; `kuea-mllm plan` says which "
        "of them suffice. runtime.check_memory=false starts it all the same.",
    )
