"""Whether language model and tower are those that a released checkpoint was trained with.

Both may fit by their sizes and be the wrong ones: no shape would tell, only scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.errors import UserError
from kuea_mllm.towers.spec import TowerSpec

EMBEDDING, TOWER = "embedding", "tower"
ACCEPTABLE = (EMBEDDING, TOWER)
"""What a caller may say to accept although it differs from the release."""

# What every release was trained with, by the width that its checkpoint tells (ViT-L/14 of OpenAI).
# Of a checkpoint of another width nothing is known, and nothing is compared.
RELEASED_TOWERS: dict[int, dict[str, Any]] = {
    1024: {
        "image_size": 224,
        "patch_size": 14,
        "layers": 24,
        "heads": 16,
        "activation": "quick_gelu",
    }
}

_BASE, _INSTRUCT = (
    "anas-awadalla/mpt-1b-redpajama-200b",
    "anas-awadalla/mpt-1b-redpajama-200b-dolly",
)
_ROWS_AT_ONCE = 4096


def check_accepted(accept: Collection[str]) -> None:
    """Refuse names of differences that there are none of.

    Raises:
        UserError: Naming the first one.
    """
    if unknown := sorted(set(accept) - set(ACCEPTABLE)):
        raise UserError(
            f"{unknown[0]!r} is nothing that can be accepted.",
            f"Known are: {', '.join(ACCEPTABLE)}.",
        )


def check_embedding(
    trained: Tensor, own: Tensor, *, rows: int, language_model: Path, name: str
) -> None:
    """Make sure that a checkpoint was trained around this language model.

    The checkpoint holds a copy of the language model's embedding in which training changed the
    rows of the added tokens alone (fact sheet, section 2.5), so all rows before those are equal.
    Where the two are stored in different dtypes, they are compared in the narrower one.

    Args:
        trained: The embedding in the checkpoint.
        own: The language model's.
        rows: Number of rows before the first added token.
        language_model: Directory of the language model, for the message.
        name: Name of its embedding there.

    Raises:
        UserError: If it has fewer rows, or other values.
    """
    if len(own) < rows:
        raise UserError(
            f"{language_model}: {name} has {len(own)} rows, the checkpoint's tokenizer {rows} "
            "before the added tokens: it is not the language model of this checkpoint.",
            _remedy(language_model),
        )
    dtype = min(trained.dtype, own.dtype, key=lambda kind: kind.itemsize)
    different, largest = 0, 0.0
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, rows))
        first, second = (tensor[part].to(dtype) for tensor in (trained, own))
        unequal = (first != second).any(dim=1)
        if bool(unequal.any()):
            different += int(unequal.sum())
            gap = (first[unequal].float() - second[unequal].float()).abs().max()
            largest = max(largest, float(gap))
    if different:
        raise UserError(
            f"{language_model} is not the language model that the checkpoint was trained with: "
            f"{different} of the first {rows} rows of {name} differ, by up to {largest:.3g}; "
            "training changes none of them.",
            _remedy(language_model),
        )


def check_tower(spec: TowerSpec, *, width: int, source: str | Path) -> None:
    """Make sure that a tower is built like the one that a checkpoint was trained with.

    Args:
        spec: The tower.
        width: Width of the tower's tokens in the checkpoint.
        source: Where the tower comes from, for the message.

    Raises:
        UserError: Naming everything that differs.
    """
    expected: Mapping[str, Any] = RELEASED_TOWERS.get(width, {})
    if different := [
        f"{key} is {getattr(spec, key)}, not {value}"
        for key, value in expected.items()
        if getattr(spec, key) != value
    ]:
        raise UserError(
            f"tower {source} is not built like the one that the checkpoint was trained with: "
            f"{'; '.join(different)}.",
            "Give OpenAI's ViT-L/14 at 224 pixels or a tower trained from it; to take this one all "
            f"the same, {_how_to_accept(TOWER)}.",
        )


def _remedy(language_model: Path) -> str:
    pairs = f"OpenFlamingo-3B belongs to {_BASE}, its Instruct variant to {_INSTRUCT}"
    # A Hub download lies under its repository's name.
    where = str(language_model.resolve())
    meant = ""
    if _INSTRUCT.rpartition("/")[2] in where:
        meant = f"; this looks like the latter, so {_BASE} is probably meant"
    elif _BASE.rpartition("/")[2] in where:
        meant = f"; this looks like the former, so {_INSTRUCT} is probably meant"
    return (
        f"{pairs}{meant}. If the checkpoint's whole embedding was trained with this language "
        f"model, {_how_to_accept(EMBEDDING)}."
    )


def _how_to_accept(difference: str) -> str:
    return f"pass --accept {difference}"
