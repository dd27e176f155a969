"""What a swap did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kuea_mllm.swapping.report import CompatibilityReport


@dataclass(frozen=True)
class SwapReceipt:
    """What a swap did.

    Attributes:
        adapter: Name of the adapter that was used.
        fingerprint_before: Fingerprint of the tower that the base held; empty if the base only
            names a tower that is not on this machine.
        fingerprint_after: Fingerprint of the tower as it is now, in the base's dtype.
        tensors_replaced: Number of tensors that were overwritten.
        key_prefix: What stands before the tower's tensor names.
        dtype: Dtype of the replaced tensors; several are joined by "+".
        seconds: Time the swap took.
        files_rewritten: Weight files that hold tensors of the tower.
        files_linked: Weight files that are hard links to those of the base.
        files_copied: All other files taken over.
        files_left_out: Weight files of the base that no loader would read, and that would
            still hold the old tower.
        compatibility: What was compared before; None if nothing was.
    """

    adapter: str
    fingerprint_before: str
    fingerprint_after: str
    tensors_replaced: int
    key_prefix: str
    dtype: str
    seconds: float
    files_rewritten: tuple[str, ...] = ()
    files_linked: tuple[str, ...] = ()
    files_copied: tuple[str, ...] = ()
    files_left_out: tuple[str, ...] = ()
    compatibility: CompatibilityReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        report = None if self.compatibility is None else self.compatibility.to_dict()
        return {**asdict(self), "compatibility": report}
