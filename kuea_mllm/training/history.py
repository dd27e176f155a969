"""Losses since the last row of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.training.distributed import gather_objects, mean_over_processes

_SHOWN = 4


class LossHistory:
    """Keeps loss terms on the device until a row is due, so that no step waits for it.

    Args:
        name: What to call an item, given its position.
        items: What the items are called together.
    """

    def __init__(self, name: Callable[[int], str] = str, *, items: str = "images") -> None:
        self._name = name
        self._items = items
        self._pending: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self._rows: list[dict[str, float]] = []
        self.first_bad: str | None = None

    def add(self, step: int, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Remember one batch.

        Args:
            step: Number of its update, from 1.
            index: Positions of its items, on the host; -1 where a stream has none.
            values: Scalars, the total first; the same names every time.
        """
        self._pending.append((step, index, {name: v.detach() for name, v in values.items()}))

    def collect(self) -> None:
        """Read what is on the device; every process has to call it at the same step."""
        if not self._pending:
            return
        names = list(self._pending[0][2])
        table = torch.stack(
            [torch.stack([values[name] for name in names]) for _, _, values in self._pending]
        )  # (steps, terms)
        # Some terms are those of one process's items.
        own, table = table, mean_over_processes(table).cpu()
        bad = (~table.isfinite()).nonzero().tolist()
        if bad and self.first_bad is None:
            row = bad[0][0]
            # The single term says more than the total, which comes first.
            column = next((c for r, c in bad if r == row and c > 0), 0)
            step, index, _ = self._pending[row]
            self.first_bad = f"{names[column]} is {table[row, column].item()} at step {step}"
            # Of the processes whose own value is bad; all of them come here at once.
            is_own = not bool(own[row, column].isfinite())
            found = gather_objects(index.tolist() if is_own else [])
            images = [i for indices in found for i in indices if i >= 0]
            if images:
                shown = ", ".join(map(self._name, images[:_SHOWN]))
                self.first_bad += f", {self._items} {shown}"
            if len(images) > _SHOWN:
                self.first_bad += f" and {len(images) - _SHOWN} more"
        self._rows += [dict(zip(names, values, strict=True)) for values in table.double().tolist()]
        self._pending = []

    def drain(self) -> dict[str, float]:
        """Return the mean of the total and of each term, and forget them."""
        self.collect()
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
        return dict(zip(rows[0], values.mean(0).tolist(), strict=True))

    def state(self) -> list[dict[str, float]]:
        """Return what a resumed run needs to log the same next row; `collect` first."""
        return [dict(row) for row in self._rows]

    def load_state(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Go on from `state`."""
        self._rows = [{name: float(value) for name, value in row.items()} for row in rows]
