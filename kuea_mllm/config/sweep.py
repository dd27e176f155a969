"""Schema of a sweep: one alignment recipe, run at every combination of some values."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from kuea_mllm.config.base import Recipe

Values = Annotated[list[Any], Field(min_length=1)]


class SweepRecipe(Recipe):
    """Everything that `kuea-mllm sweep` needs to know."""

    kind: Literal["sweep"]
    recipe: str = Field(description="Alignment recipe: shipped name or path.")
    settings: dict[str, Any] = Field(
        default={}, description="Keys changed in every run, by dotted path."
    )
    grid: Annotated[dict[str, Values], Field(min_length=1)] = Field(
        description="Dotted path of a key to its values; every combination is one run."
    )

    def combinations(self) -> list[dict[str, Any]]:
        """Return the changed keys of every run, the last key varying fastest."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


def name_run(changes: dict[str, Any]) -> str:
    """Return a name for a combination that can be a folder: `kernel_weight=0.5,epochs=2`."""
    parts = [f"{path.rpartition('.')[2]}={_short(value)}" for path, value in changes.items()]
    return ",".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        # A kernel, for one: its values say enough, in their order.
        text = "-".join(_short(part) for part in value.values())
    else:
        text = yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
