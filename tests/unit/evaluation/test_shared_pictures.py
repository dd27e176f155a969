"""The average over columns that are about some of the same pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_data import make_row, write_results

from kuea_mllm.evaluation.comparing import average
from kuea_mllm.evaluation.comparing.average import AverageComparison, compare_average
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.evaluation.comparing.paired_rows import make_strata
from kuea_mllm.evaluation.comparing.pairing import ColumnComparison
from kuea_mllm.evaluation.comparing.resampling import Stratum
from kuea_mllm.evaluation.comparing.shared_pictures import picture_name, picture_pulls, widening
from kuea_mllm.evaluation.comparing.stats import compare_measures
from kuea_mllm.evaluation.measures import Array, RatioMeasure
from kuea_mllm.evaluation.results import write_rows


@pytest.mark.parametrize(
    ("cluster", "image", "name"),
    [
        ("COCO_val2014_000000310196", None, "coco 310196"),
        ("310196", "/data/val2014/COCO_val2014_000000310196.jpg", "coco 310196"),
        ("000000310196.jpg", None, "coco 310196"),
        ("val2014/COCO_val2014_000000310196.jpg", None, "coco 310196"),
        ("2", "/data/textvqa/train_images/0a1b.jpg", "/data/textvqa/train_images/0a1b.jpg"),
        # Anybody's numbers.
        ("310196", None, None),
        ("000000310196", None, None),
        ("pair_000000310196.jpg", None, None),
    ],
)
def test_picture_is_known_by_its_number_in_coco_or_its_file(
    cluster: str, image: str | None, name: str | None
) -> None:
    assert picture_name(make_row(0, 1.0, cluster, image=image)) == name


def test_pulls_are_those_of_clusters_with_one_picture() -> None:
    files = ["a.jpg", "a.jpg", "b.jpg", "left.jpg", "right.jpg", None]
    clusters = ["a", "a", "b", "pair", "pair", "unknown"]
    before, after = (
        [
            make_row(number, score, cluster, image=file)
            for number, (score, cluster, file) in enumerate(
                zip(scores, clusters, files, strict=True)
            )
        ]
        for scores in ([0.0, 0, 100, 0, 0, 0], [100.0, 100, 100, 100, 100, 0])
    )
    used = [list(zip(before, after, strict=True))]
    found = picture_pulls(used, make_strata(used, "mean", 100), 100.0)
    # Four of six rose: a by 1/3 more than the mean in both of its questions, b by 2/3 less.
    assert found == pytest.approx({"a.jpg": 2 / 18, "b.jpg": -2 / 18})


def write_pair(root: Path, columns: dict[str, tuple[Sequence[str], list[float]]]) -> list[Path]:
    """Write a baseline without any right answer, and a candidate; images are named by file."""
    paths = []
    for side in ("a", "b"):
        scores = {
            task: found if side == "b" else [0.0] * 60 for task, (_, found) in columns.items()
        }
        path = write_results(root / side, scores)
        for task, (files, _) in columns.items():
            rows = [
                make_row(number, score, f"{task} {file}", image=file)
                for number, (file, score) in enumerate(zip(files, scores[task], strict=True))
            ]
            write_rows(path / "samples" / f"{task}.jsonl", rows)
        paths.append(path)
    return paths


def average_of(paths: list[Path]) -> AverageComparison:
    found = compare_results(*paths, resamples=2000).average
    assert found is not None
    return found


def width(found: AverageComparison) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low


def test_average_widens_by_the_share_of_common_pictures(tmp_path: Path) -> None:
    scores = [float(x) for x in np.random.default_rng(0).integers(0, 2, 60)]
    first = [f"{number}.jpg" for number in range(60)]
    widths = []
    for shared in (0, 30, 60):
        second = [*first[:shared], *(f"{number}.png" for number in range(shared, 60))]
        columns = {"one": (first, scores), "two": (second, scores)}
        widths.append(width(average_of(write_pair(tmp_path / str(shared), columns))))
    # Variances of the sum, if that of a column is 1: 2 apart, 3 with half in common, 4 with all.
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(1.5), rel=0.03)
    assert widths[2] / widths[0] == pytest.approx(np.sqrt(2.0), rel=0.03)


def test_columns_without_a_common_picture_are_exactly_as_independent_as_unknown_ones(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    known = {
        task: ([f"{task}{n}.jpg" for n in range(60)], [float(x) for x in rng.integers(0, 2, 60)])
        for task in ("one", "two")
    }
    paths = write_pair(tmp_path, known)
    named = average_of(paths).to_json()
    for path in (file for folder in paths for file in (folder / "samples").iterdir()):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"image": None}) + "\n" for row in rows))
    assert average_of(paths).to_json() == named


def test_groups_of_columns_about_the_same_pictures_are_left_as_they_are() -> None:
    draws = [np.arange(5.0)]
    assert widening(draws, [[{"a": 1.0}, {"a": 1.0}]]) == 1.0
    assert widening([*draws, *draws], [[{"a": 1.0}, {"b": 2.0}], [{"c": 3.0}]]) == 1.0


def simulated_column(ids: Array, effects: Array, rng: np.random.Generator, seed: int) -> Any:
    """Make one column: a dozen questions a picture, which all rise with the picture's effect."""
    asked = rng.integers(1, 24, len(ids))
    ease = np.clip(rng.normal(0.5, 0.2, len(ids)), 0, 1)
    measures = [
        RatioMeasure(rng.binomial(asked, rate)[:, None].astype(float), asked[:, None].astype(float))
        for rate in (ease, np.clip(ease + effects, 0, 1))
    ]
    stratum = Stratum((measures[0],), (measures[1],), len(ids), int(asked.sum()))
    found = compare_measures([stratum], resamples=499, seed=seed)
    plain = {"task": f"{seed}", "column": f"{seed}", "suite": None, "protocol": "p", "metric": "m"}
    return ColumnComparison(
        **{**plain, "statistic": "mean", "judged": False, "part": None, "version": 1},  # type: ignore[arg-type]
        higher_is_better=True,
        scale=1,
        is_paired=True,
        reason=None,
        missing=None,
        baseline=0.0,
        candidate=found.difference,
        difference=found.difference,
        low=found.low,
        high=found.high,
        draws=found.draws,
        clusters=found.clusters,
        changed_clusters=found.changed_clusters,
        pulls=dict(zip(map(str, ids.tolist()), stratum.influences.tolist(), strict=True)),
    )


def simulated_pair(rng: np.random.Generator, count: int, seed: int) -> list[ColumnComparison]:
    """Make two columns of `count` pictures, nine of ten the same."""
    effects = rng.normal(0.03, 0.25, count + count // 10)
    ids = np.arange(len(effects))
    return [
        simulated_column(part, effects[part], rng, 2 * seed + number)
        for number, part in enumerate((ids[:count], ids[-count:]))
    ]


def test_average_over_common_pictures_covers_the_truth_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = float(
        np.mean(
            [column.difference for column in simulated_pair(np.random.default_rng(9), 10**5, 0)]
        )
    )
    rng, runs = np.random.default_rng(0), 500
    pairs = [simulated_pair(rng, 150, seed) for seed in range(runs)]
    hits = []
    for rule in (widening, lambda *_: 1.0):
        monkeypatch.setattr(average, "widening", rule)
        found = [compare_average(pair) for pair in pairs]
        hits.append(sum((a.low or 0.0) <= truth <= (a.high or 0.0) for a in found if a) / runs)
    assert 0.93 <= hits[0] <= 0.97
    # Taken as independent, the columns would seem to know more than they do.
    assert hits[1] < 0.91
