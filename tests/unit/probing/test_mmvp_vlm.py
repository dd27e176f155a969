"""MMVP-VLM: the rule on constructed pairs, the layout of the release, and what may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_data import picture, write_clip
from torch import Tensor

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.probing.embedder import tower_embedder
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.probing.mmvp_vlm import PATTERNS, open_mmvp_vlm, picked_pictures, probe_mmvp_vlm
from kuea_mllm.probing.partner import load_partner
from kuea_mllm.towers.reading.load import load_tower

# As the folders of the release are called.
FOLDERS = (
    "Orientation",
    "Presence",
    "State",
    "Quantity",
    "Spatial",
    "Color",
    "Structural Character",
    "Text",
    "Camera Perspective",
)
EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)


class Words:
    """A text tower that gives known embeddings, in the order of the prompts."""

    source = "words"

    def __init__(self, embeddings: Sequence[Sequence[float]]) -> None:
        self.asked: list[str] = []
        self._embeddings = torch.tensor(embeddings)

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return self._embeddings

    def describe(self) -> dict[str, Any]:
        return {"source": self.source}


def write_benchmark(folder: Path, patterns: Sequence[str], pairs: int) -> None:
    """Write so many pairs of each pattern in the layout of the release."""
    lines, number = ["Question ID,Type,Statement"], 1
    for pattern in patterns:
        where = folder / "MLLM_VLM Images" / pattern
        where.mkdir(parents=True, exist_ok=True)
        for _ in range(pairs):
            for which in ("left", "right"):
                lines.append(f'{number},{pattern},"a dog, looking {which}"')
                picture(number).save(where / f"{number}.jpg")
                number += 1
    folder.mkdir(exist_ok=True)
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n")


def change(folder: Path, line: int, text: str | None) -> None:
    """Replace one line of the questions, counted from 1, or leave it out."""
    path = folder / "Questions.csv"
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("pictures", "statements", "expected"),
    [
        ([EAST, NORTH], [EAST, NORTH], [0, 1]),
        ([EAST, NORTH], [NORTH, EAST], [1, 0]),
        # Both statements are closer to one picture.
        ([EAST, NORTH], [EAST, (2.0, 1.0)], [0, 0]),
        ([EAST, NORTH], [(1.0, 2.0), NORTH], [1, 1]),
        # A cosine: the length of the second picture would win otherwise.
        ([EAST, (0.0, 50.0)], [(2.0, 1.0), NORTH], [0, 1]),
        # Equals go to the second.
        ([EAST, EAST], [NORTH, EAST], [1, 1]),
        ([EAST, WEST], [NORTH, NORTH], [1, 1]),
    ],
)
def test_statement_picks_the_closer_picture(
    pictures: Any, statements: Any, expected: list[int]
) -> None:
    assert picked_pictures(torch.tensor(pictures), torch.tensor(statements)).tolist() == [expected]


def test_pick_is_that_of_a_softmax_over_the_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, statements = (torch.randn(40, 8, generator=generator) for _ in range(2))
    unit = [torch.nn.functional.normalize(rows, dim=-1) for rows in (pictures, statements)]
    picks = picked_pictures(pictures, statements)
    for pair in range(20):
        for which in (0, 1):
            logits = 100 * unit[1][2 * pair + which] @ unit[0][2 * pair : 2 * pair + 2].T
            assert picks[pair, which] == int(logits.softmax(0)[0] <= 0.5)
    assert 0 < picks.double().mean() < 1


def test_pair_is_right_only_if_both_statements_are(tmp_path: Path) -> None:
    """Two patterns of 1 and 3 pairs: their mean is that of patterns, not of pairs."""
    write_benchmark(tmp_path, ["Orientation"], 1)
    more = tmp_path / "more"
    write_benchmark(more, ["Text"], 4)
    text = (more / "Questions.csv").read_text().splitlines()[3:]
    with (tmp_path / "Questions.csv").open("a") as file:
        file.write("\n".join(text) + "\n")
    for number in (1, 2):
        (more / "MLLM_VLM Images" / "Text" / f"{number}.jpg").unlink()
    data = open_mmvp_vlm(tmp_path)
    pictures = np.array([EAST, NORTH] * 4, dtype=np.float32)
    words = Words([EAST, NORTH, EAST, NORTH, EAST, EAST, NORTH, EAST])
    column = probe_mmvp_vlm(pictures, data, words)  # type: ignore[arg-type]
    assert [row.score for row in column.rows] == [1, 1, 0, 0]
    assert [row.group for row in column.rows] == ["orientation and direction", *["text"] * 3]
    assert column.details["patterns"] == pytest.approx(
        {"orientation and direction": 100, "text": 100 / 3}
    )
    assert column.score == pytest.approx((100 + 100 / 3) / 2)
    assert column.statistic == "mean_of_groups"
    assert column.details["statement_accuracy"] == pytest.approx(100 * 5 / 8)
    assert not column.details["is_whole"]
    assert words.asked[:2] == ["a photo of a dog, looking left", "a photo of a dog, looking right"]
    last = column.rows[3]
    assert (last.target, last.answer) == ("picture 7 | picture 8", "picture 8 | picture 7")
    assert last.cluster == "7-8"


def test_release_is_read_whole_and_one_pair_is_one_in_135(tmp_path: Path) -> None:
    write_benchmark(tmp_path, FOLDERS, 15)
    data = open_mmvp_vlm(tmp_path)
    assert len(data.pairs) == 135
    assert [Path(data.images.name(i)).stem for i in range(270)] == [str(i) for i in range(1, 271)]
    right = [EAST, NORTH] * 135
    wrong = [*right[:-2], NORTH, EAST]
    pictures = np.array(right, dtype=np.float32)
    column = probe_mmvp_vlm(pictures, data, Words(wrong))  # type: ignore[arg-type]
    assert column.details["is_whole"]
    assert column.score == pytest.approx(100 * 134 / 135)
    assert column.details["patterns"]["viewpoint and perspective"] == pytest.approx(1400 / 15)
    assert list(column.details["patterns"]) == list(dict.fromkeys(PATTERNS.values()))


def test_tower_and_its_text_tower_are_scored(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    write_benchmark(tmp_path / "data", FOLDERS[:3], 2)
    tower = load_tower(str(tmp_path / "clip"))
    data = open_mmvp_vlm(tmp_path / "data", limit=4)
    how = Extraction(workers=0, cache=tmp_path / "cache")
    features = extract(data.images, tower_embedder(tower), how).embeddings
    column = probe_mmvp_vlm(features, data, load_partner(tower))
    assert len(column.rows) == 4
    assert [row.doc_id for row in column.rows] == list(range(4))


def test_odd_number_of_statements_is_refused(tmp_path: Path) -> None:
    write_benchmark(tmp_path, ["Text"], 2)
    change(tmp_path, 5, None)
    with pytest.raises(DataError, match=r"Questions\.csv has 3 statements"):
        open_mmvp_vlm(tmp_path)


def test_no_statement_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Questions.csv").write_text("")
    with pytest.raises(DataError, match="has 0 statements"):
        open_mmvp_vlm(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write_benchmark(tmp_path, ["Text"], 2)
    (tmp_path / "MLLM_VLM Images" / "Text" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"names picture 3 \(text\), which is not there"):
        open_mmvp_vlm(tmp_path)


def test_picture_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_benchmark(tmp_path, ["Text"], 2)
    picture(3).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"picture 3 .* is there twice \(3\.png, MLLM"):
        open_mmvp_vlm(tmp_path)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, "4,Text,b", "line 2: ids 1 and 4|line 5: id 4 is there a second time"),
        (2, "2,Text,b", "line 3: id 2 is there a second time"),
        (2, "6,Text,b", "line 2: ids 6 and 2 are no pair"),
        (3, "2,Color,b", "line 2: ids 1 and 2 are of two patterns, 'text' and 'color and"),
        (4, "3,Text,a dog, and a cat", "line 4: expected id, pattern and statement"),
        (4, "three,Text,b", "line 4: expected id, pattern and statement"),
        (4, "3,Text, ", "line 4: expected id, pattern and statement"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: int, text: str, message: str) -> None:
    write_benchmark(tmp_path, ["Text"], 2)
    change(tmp_path, line, text)
    with pytest.raises(DataError, match=message):
        open_mmvp_vlm(tmp_path)


def test_missing_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Questions\.csv cannot be read: No such file"):
        open_mmvp_vlm(tmp_path)


def test_nan_names_its_pair() -> None:
    pictures = torch.ones(4, 2)
    pictures[3, 0] = float("nan")
    with pytest.raises(TowerError, match="picture 2 of pair 2 holds NaN"):
        picked_pictures(pictures, torch.ones(4, 2))
    with pytest.raises(TowerError, match="statement 2 of pair 2 holds NaN"):
        picked_pictures(torch.ones(4, 2), pictures)


def test_other_number_of_embeddings_is_refused(tmp_path: Path) -> None:
    write_benchmark(tmp_path, ["Text"], 2)
    with pytest.raises(DataError, match="4 pictures, but 2 embeddings"):
        probe_mmvp_vlm(
            np.ones((2, 2), np.float32),
            open_mmvp_vlm(tmp_path),
            Words([EAST]),  # type: ignore[arg-type]
        )
