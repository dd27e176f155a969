"""Data sets of the mini world in the layouts of the encoder benchmarks, for `world probe`.

Class folders for zero-shot and linear probes, Karpathy's file for retrieval, pictures with label
maps as COCO-Stuff has them, and pairs of pictures as in MMVP-VLM.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kuea_mllm.io import atomic_directory
from kuea_mllm.miniworld.captions import PREFIXES, caption_scene, describe
from kuea_mllm.miniworld.rendering import Images, render_scenes
from kuea_mllm.miniworld.scenes import CANVAS, CELL, TEXTURES, Scene, sample_scenes

STYLES = {
    "single": "natural",
    "tiny": "tiny",
    "large": "large",
    "shift": "shift",
    "sketch": "sketch",
    "gray": "gray",
    "invert": "invert",
    "noisy": "noisy",
    "blur": "blur",
}
"""Zero-shot sets and how they are drawn; the styles after "single" are never trained on."""
LABELS: dict[str, Callable[[Scene], str]] = {
    "digit": lambda scene: scene.objects[0].digit_name,
    "colour": lambda scene: scene.objects[0].colour_name,
    "quarter": lambda scene: scene.objects[0].quarter_name.replace(" ", "_"),
    "count": lambda scene: str(len(scene.objects)),
}
"""What a linear probe is trained for."""
TRAIN, TEST = "train", "test"
CAPTIONED, LABELLED, PAIRS = "captioned", "coco", "pairs"
"""Folders of the other data sets."""

_CAPTIONS = 5
_NOTHING = 255  # "unlabeled" in COCO-Stuff
_SEED = 78


def write_probe_sets(folder: Path, *, split: str, per_set: int, train: int) -> None:
    """Write all data sets, one sub-folder each.

    Args:
        folder: Folder to create.
        split: Split of the scans in the pictures that are scored; those that probes are trained on
            show "train" scans.
        per_set: Pictures in each set that is scored.
        train: Pictures in each set that a probe is trained on.

    Raises:
        OutputError: If `folder` exists or cannot be created.
        DataError: If there is no such split.
    """
    with atomic_directory(folder) as partial:
        for name, style in STYLES.items():
            scenes, pictures = _draw(name, split, per_set, (1, 1), style)
            _write_classes(partial / name / TEST, scenes, pictures, LABELS["digit"])
            templates = "\n".join(f"{prefix} {{c}}" for prefix in PREFIXES)
            (partial / name / "zeroshot_classification_templates.txt").write_text(templates)
        for name, label in LABELS.items():
            objects = (1, 4) if name == "count" else (1, 1)
            for part, scans, count in ((TRAIN, "train", train), (TEST, split, per_set)):
                scenes, pictures = _draw(f"linear-{part}", scans, count, objects, "natural")
                _write_classes(partial / f"linear_{name}" / part, scenes, pictures, label)
        _write_captioned(partial / CAPTIONED, split, per_set)
        for part, scans, count in (("train", "train", train), ("val", split, per_set)):
            _write_labelled(partial / LABELLED, part, scans, count)
        _write_pairs(partial / PAIRS, split, max(1, per_set // 10))


def _draw(
    name: str, split: str, count: int, objects: tuple[int, int], style: str
) -> tuple[list[Scene], Images]:
    seed = [_SEED, *f"{split}/{name}/{objects[1]}".encode()]
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    scenes = sample_scenes(count, split, seed=number, objects=objects)
    return scenes, render_scenes(scenes, np.random.default_rng(seed), style)


def _write_classes(
    folder: Path, scenes: Sequence[Scene], pictures: Images, label: Callable[[Scene], str]
) -> None:
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        _save(picture, folder / label(scene) / f"{number:05d}.png")


def _write_captioned(folder: Path, split: str, count: int) -> None:
    scenes, pictures = _draw("retrieval", split, count, (2, 4), "natural")
    rng = np.random.default_rng(_SEED)
    entries = []
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        name = f"{number:05d}.png"
        _save(picture, folder / "images" / name)
        # Digits and background: with digits alone, many pictures would share a caption.
        texts = [
            f"{caption_scene(scene, rng, is_noisy=False)} on a {scene.texture_name} background"
            for _ in range(_CAPTIONS)
        ]
        entries.append(
            {"filename": name, "split": TEST, "sentences": [{"raw": text} for text in texts]}
        )
    (folder / "dataset.json").write_text(json.dumps({"images": entries}), encoding="utf-8")


def _write_labelled(folder: Path, part: str, split: str, count: int) -> None:
    scenes, pictures = _draw(f"patches-{part}", split, count, (1, 4), "natural")
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        labels = np.full((CANVAS, CANVAS), _NOTHING, dtype=np.uint8)
        for item in scene.objects:
            top, left = item.row * CELL, item.column * CELL
            # One class of COCO-Stuff for each digit; the names of its classes mean nothing here.
            labels[top : top + CELL, left : left + CELL] = item.digit
        _save(picture, folder / "images" / part / f"{number:05d}.png")
        _save(labels, folder / "annotations" / part / f"{number:05d}.png")


def _write_pairs(folder: Path, split: str, count: int) -> None:
    """Write `count` pairs for each of three patterns: another digit, more digits, background."""
    scenes, _ = _draw("pairs", split, 3 * count, (3, 3), "natural")
    rng = np.random.default_rng(_SEED)
    rows: list[tuple[int, str, str]] = []
    for number, scene in enumerate(scenes):
        pattern, both = _PATTERNS[number // count]
        for twin in both(scene):
            name = len(rows) + 1
            _save(render_scenes([twin], rng)[0], folder / "images" / f"{name}.png")
            texture = twin.texture_name if pattern.startswith("State") else None
            rows.append((name, pattern, _statement(twin, texture)))
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "pattern", "statement"))
        writer.writerows(rows)


def _other_digit(scene: Scene) -> tuple[Scene, Scene]:
    first, second, third = scene.objects
    return replace(scene, objects=(first, second)), replace(scene, objects=(first, third))


def _more_digits(scene: Scene) -> tuple[Scene, Scene]:
    return replace(scene, objects=scene.objects[:1]), scene


def _other_background(scene: Scene) -> tuple[Scene, Scene]:
    alone = replace(scene, objects=scene.objects[:1])
    return alone, replace(alone, texture=(scene.texture + 1) % len(TEXTURES))


_PATTERNS: tuple[tuple[str, Callable[[Scene], tuple[Scene, Scene]]], ...] = (
    ("Presence of Specific Features", _other_digit),
    ("Quantity and Count", _more_digits),
    ("State and Condition", _other_background),
)


def _statement(scene: Scene, texture: str | None) -> str:
    # The benchmark puts "a photo of" in front.
    text = describe([item.digit_name for item in scene.objects], texture)
    return text.removeprefix(f"{PREFIXES[0]} ")


def _save(picture: Images, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
