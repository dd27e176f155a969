"""Unreadable images: left out up to a stated limit, counted once each, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuea_mllm.errors import UnreadableImage
from kuea_mllm.log import LOGGER

# Names of a stream travel with the batch in this many bytes (their end, which tells most).
NAME_BYTES = 256


@dataclass(frozen=True, eq=False)
class SkipPolicy:
    """What a data set does about images that cannot be read.

    Attributes:
        limit: How many different images may be left out; 0 raises at the first one.
        positions: Sorted positions that a replacement may come from, so that no held-out image
            slips into training; None allows all.
    """

    limit: int
    positions: np.ndarray | None = None

    def candidates(self, position: int, count: int) -> Iterator[int]:
        """Yield the position itself, then the ones to try in its place, each once."""
        yield position
        if self.positions is None:
            yield from ((position + step) % count for step in range(1, count))
            return
        start = int(np.searchsorted(self.positions, position, side="right"))
        for step in range(len(self.positions)):
            candidate = int(self.positions[(start + step) % len(self.positions)])
            if candidate != position:
                yield candidate


class UnreadableCounter:
    """Counts, in the main process, the different images that batches had to do without.

    Args:
        limit: How many are allowed.
        name: Position to name, for the report (`source.name`); streams bring names along.
    """

    def __init__(self, limit: int, name: Callable[[int], str] | None = None) -> None:
        self.limit = limit
        self._name = name
        self._names: dict[int, str] = {}

    @property
    def count(self) -> int:
        """Different unreadable images so far."""
        return len(self._names)

    def update(self, batch: Mapping[str, Any]) -> None:
        """Take note of a collated batch.

        Args:
            batch: As it comes from the DataLoader; batches without "replaced" count nothing.

        Raises:
            UnreadableImage: If the limit is passed.
        """
        replaced = batch.get("replaced")
        if replaced is None:
            return
        for row, key in enumerate(np.asarray(replaced).reshape(-1).tolist()):
            if key == -1 or key in self._names:
                continue
            self._names[key] = self._name_of(batch, row, key)
            LOGGER.warning("left out image %s: it cannot be read", self._names[key])
        if self.count > self.limit:
            raise too_many_unreadable(self.count, self.limit, list(self._names.values()))

    def report(self) -> dict[str, Any]:
        """Return count and names, for the run record."""
        return {"count": self.count, "limit": self.limit, "images": sorted(self._names.values())}

    def _name_of(self, batch: Mapping[str, Any], row: int, key: int) -> str:
        if "replaced_name" in batch:
            return unpack_name(np.asarray(batch["replaced_name"][row]))
        return self._name(key) if self._name is not None else f"number {key}"


def too_many_unreadable(count: int, limit: int, names: Sequence[str]) -> UnreadableImage:
    """Return the error that ends a run."""
    shown = ", ".join(names[:3]) + (", ..." if count > len(names[:3]) else "")
    return UnreadableImage(
        f"{count} images cannot be read, {limit} are allowed (data.skip_unreadable): {shown}.",
        "Find them all with `kuea-mllm doctor --images SOURCE`, replace or remove them, or raise "
        "data.skip_unreadable.",
    )


def pack_name(name: str) -> np.ndarray:
    """Return the end of a name as uint8, (NAME_BYTES,), which any collation can stack."""
    text = name.encode("utf-8", errors="replace")[-NAME_BYTES:]
    return np.frombuffer(text.ljust(NAME_BYTES, b"\0"), dtype=np.uint8).copy()


def unpack_name(packed: np.ndarray) -> str:
    """Return the name that `pack_name` packed."""
    return packed.tobytes().rstrip(b"\0").decode("utf-8", errors="replace")
