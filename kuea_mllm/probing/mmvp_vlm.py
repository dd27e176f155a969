"""MMVP-VLM: pairs of pictures that CLIP takes for the same, and a statement about each.

Each statement, as "a photo of ...", picks the picture of its pair that it is closer to; a pair is
right if both statements pick theirs. By chance that happens to one pair in four. The score is the
mean over the visual patterns of the share of right pairs.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from kuea_mllm.data.source import has_image_suffix
from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.column import ProbeColumn, ProbeRow
from kuea_mllm.probing.datasets.dataset import PathImages
from kuea_mllm.probing.partner import TextPartner

SUITE = "mmvp-vlm"
QUESTIONS_FILE = "Questions.csv"
PROMPT = "a photo of "
# First word of a pattern, as the release or its folders call it -> as the paper's table does.
PATTERNS = {
    "orientation": "orientation and direction",
    "presence": "presence of specific features",
    "state": "state and condition",
    "quantity": "quantity and count",
    "positional": "positional and relational context",
    "spatial": "positional and relational context",
    "color": "color and appearance",
    "structural": "structural and physical characteristics",
    "text": "text",
    "texts": "text",
    "viewpoint": "viewpoint and perspective",
    "camera": "viewpoint and perspective",
}
PATTERN_COUNT, PAIRS_PER_PATTERN = 9, 15
_COLUMNS = 3


@dataclass(frozen=True)
class Pair:
    """Two pictures and a statement that is true of each.

    Attributes:
        pattern: What tells the pictures apart.
        ids: Ids of the pictures, the first odd.
        statements: What is to be seen in each.
    """

    pattern: str
    ids: tuple[int, int]
    statements: tuple[str, str]


@dataclass(frozen=True, eq=False)
class MmvpVlm:
    """The benchmark.

    Attributes:
        source: Where it lies.
        pairs: In the order of the file.
        images: Two for each pair, in the same order.
        total: Pairs of the file, of which a limit may have left only some.
    """

    source: str
    pairs: tuple[Pair, ...]
    images: PathImages
    total: int

    @property
    def prompts(self) -> list[str]:
        """The text of each picture."""
        return [PROMPT + statement for pair in self.pairs for statement in pair.statements]


def open_mmvp_vlm(folder: Path, *, limit: int | None = None) -> MmvpVlm:
    """Read `Questions.csv` (id, pattern, statement) and find the pictures by their ids.

    Pictures lie anywhere below the folder as `<id>.jpg` or with another ending.

    Args:
        folder: Folder of the benchmark.
        limit: Take this many pairs, spread evenly over the file.

    Raises:
        DataError: If the file is missing or not of that layout (names the line), or a picture is
            missing or there twice.
    """
    path = folder / QUESTIONS_FILE
    pairs = _read_pairs(path)
    total = len(pairs)
    if limit is not None and limit < len(pairs):
        chosen = np.linspace(0, len(pairs) - 1, limit).round().astype(int).tolist()
        pairs = [pairs[index] for index in chosen]
    where = _find_pictures(folder)
    names = []
    for pair in pairs:
        for number in pair.ids:
            found = where.get(number, [])
            if len(found) != 1:
                problem = "is not there" if not found else f"is there twice ({', '.join(found)})"
                raise DataError(
                    f"{path} names picture {number} ({pair.pattern}), which {problem} below "
                    f"{folder}.",
                    "Fetch the whole data set MMVP/MMVP_VLM; one file for each id.",
                )
            names.append(found[0])
    images = PathImages(folder, names, named_by=str(path))
    return MmvpVlm(str(folder), tuple(pairs), images, total)


def probe_mmvp_vlm(
    features: NDArray[np.float32],
    data: MmvpVlm,
    partner: TextPartner,
    *,
    name: str = "MMVP-VLM",
    details: dict[str, Any] | None = None,
) -> ProbeColumn:
    """Score a tower on the pairs.

    Args:
        features: Embeddings of `data.images`, not normalised.
        data: The benchmark.
        partner: The text tower.
        name: Heading of the column.
        details: More to note about how it was made.

    Returns:
        A column of metric "pair_accuracy" and statistic "mean_of_groups", groups being patterns;
        `details["patterns"]` holds the score of each.

    Raises:
        DataError: If there are not as many embeddings as pictures.
        TowerError: If an embedding is not finite.
    """
    if len(features) != len(data.images):
        raise DataError(
            f"{data.source} has {len(data.images)} pictures, but {len(features)} embeddings."
        )
    picks = picked_pictures(torch.from_numpy(np.array(features)), partner.encode(data.prompts))
    rows = [_row(index, pair, picks[index].tolist(), data) for index, pair in enumerate(data.pairs)]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(str(row.group), []).append(row.score or 0.0)
    patterns = {pattern: 100 * sum(scores) / len(scores) for pattern, scores in groups.items()}
    sizes = {pattern: len(scores) for pattern, scores in groups.items()}
    is_whole = len(sizes) == PATTERN_COUNT and set(sizes.values()) == {PAIRS_PER_PATTERN}
    if not is_whole:
        LOGGER.warning(
            "MMVP-VLM: %d pairs of %d patterns, not the 15 of each of 9 that published scores have",
            len(rows),
            len(sizes),
        )
    return ProbeColumn(
        name=name,
        metric="pair_accuracy",
        score=sum(patterns.values()) / len(patterns),
        statistic="mean_of_groups",
        rows=rows,
        suite=SUITE,
        details={
            "patterns": patterns,
            "pairs_per_pattern": sizes,
            "is_whole": is_whole,
            "statement_accuracy": 100 * (picks == torch.tensor([0, 1])).double().mean().item(),
            "chance": 25.0,
            "prompt": PROMPT + "{statement}",
            "dataset": {
                "name": "MMVP-VLM",
                "source": data.source,
                "pairs": len(rows),
                "fingerprint": data.images.fingerprint(),
            },
            "text_tower": partner.describe(),
            **(details or {}),
        },
    )


def picked_pictures(pictures: Tensor, statements: Tensor) -> Tensor:
    """Return which picture of its pair each statement is closer to by cosine.

    A softmax over the two pictures gives the first more than one half exactly if it is the closer
    one; of equals the second is picked, as in the released code.

    Args:
        pictures: Embeddings, (2 pairs, width), first and second of each pair in turn.
        statements: Embeddings, (2 pairs, width), in the same order.

    Returns:
        0 for the first, 1 for the second: (pairs, 2), one column per statement.

    Raises:
        TowerError: If an embedding is not finite.
    """
    for what, rows in (("picture", pictures), ("statement", statements)):
        if not rows.isfinite().all():
            bad = int((~rows.isfinite().all(1)).nonzero()[0])
            raise TowerError(
                f"MMVP-VLM: the embedding of {what} {bad % 2 + 1} of pair {bad // 2 + 1} holds NaN "
                "or infinity.",
                "Compute in float32 (--dtype float32); if it stays, the weights are damaged.",
            )
    pairs = len(pictures) // 2
    seen = normalize(pictures, dim=-1).view(pairs, 2, -1)  # (pairs, pictures, width)
    said = normalize(statements, dim=-1).view(pairs, 2, -1)  # (pairs, statements, width)
    closeness = said @ seen.transpose(1, 2)  # (pairs, statements, pictures)
    picks: Tensor = (closeness[:, :, 0] <= closeness[:, :, 1]).long()
    return picks


def _row(index: int, pair: Pair, picks: Sequence[int], data: MmvpVlm) -> ProbeRow:
    return ProbeRow(
        doc_id=index,
        cluster=f"{pair.ids[0]}-{pair.ids[1]}",
        question=" | ".join(pair.statements),
        target=" | ".join(f"picture {number}" for number in pair.ids),
        answer=" | ".join(f"picture {pair.ids[pick]}" for pick in picks),
        score=float(list(picks) == [0, 1]),
        group=pair.pattern,
        image=data.images.name(2 * index),
    )


def _read_pairs(path: Path) -> list[Pair]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            next(reader, None)  # the header
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"{path} cannot be read: {reason}.", "Give the folder of the data set MMVP/MMVP_VLM."
        ) from error
    if not rows or len(rows) % 2:
        raise DataError(
            f"{path} has {len(rows)} statements; they come in pairs, so their number is even and "
            "not 0.",
            "Fetch it again; the release has 270 after a header.",
        )
    parsed = [_parse(path, line, row) for line, row in rows]
    seen: set[int] = set()
    for (line, _), (number, _, _) in zip(rows, parsed, strict=True):
        if number in seen:
            raise DataError(f"{path}, line {line}: id {number} is there a second time.")
        seen.add(number)
    pairs = []
    for position in range(0, len(parsed), 2):
        (one, pattern, first), (other, second_pattern, second) = parsed[position : position + 2]
        where = f"{path}, line {rows[position][0]}"
        if one % 2 == 0 or other % 2 == 1:
            raise DataError(
                f"{where}: ids {one} and {other} are no pair; the first is odd, the second even.",
                "Every two lines are a pair, in the order of the release.",
            )
        if pattern != second_pattern:
            raise DataError(
                f"{where}: ids {one} and {other} are of two patterns, {pattern!r} and "
                f"{second_pattern!r}.",
                "Every two lines are a pair, in the order of the release.",
            )
        pairs.append(Pair(pattern, (one, other), (first, second)))
    return pairs


def _parse(path: Path, line: int, row: Sequence[str]) -> tuple[int, str, str]:
    if len(row) != _COLUMNS or not row[0].strip().isdecimal() or not row[2].strip():
        raise DataError(
            f"{path}, line {line}: expected id, pattern and statement, found {list(row)!r}.",
            "Put statements that hold a comma in quotes.",
        )
    return int(row[0]), _pattern(row[1]), row[2]


def _pattern(text: str) -> str:
    plain = " ".join(text.replace("_", " ").split())
    return PATTERNS.get(plain.lower().split(" ")[0], plain)


def _find_pictures(folder: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.stem.isdecimal() and has_image_suffix(path.name):
            found.setdefault(int(path.stem), []).append(str(path.relative_to(folder)))
    return found
