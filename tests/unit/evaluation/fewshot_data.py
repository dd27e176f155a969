"""The seven data sets in their original layouts, each with a few tiny images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

TRAIN, TEST = 6, 4
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
# The answers of ten annotators to test question i; the majority is right.
ANSWERS = [["red"] * 10, ["two"] * 8 + ["3"] * 2, ["no"] * 2 + ["yes"] * 8, ["a cat"] * 10]


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + number, 18), COLOURS[number % len(COLOURS)]).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_all(root: Path) -> dict[str, str]:
    """Write all seven and return their folders."""
    write_karpathy(root / "coco", "dataset_coco.json", is_coco=True)
    write_karpathy(root / "flickr30k", "dataset_flickr30k.json", is_coco=False)
    coco = "{part}2014/COCO_{part}2014_{id:012d}.jpg"
    write_vqa(
        root / "vqav2",
        "v2_OpenEnded_mscoco_{part}2014_questions.json",
        "v2_mscoco_{part}2014_annotations.json",
        coco,
    )
    write_vqa(
        root / "okvqa",
        "OpenEnded_mscoco_{part}2014_questions.json",
        "mscoco_{part}2014_annotations.json",
        coco,
        has_raw=True,
    )
    shipped = ("{part}_questions_vqa_format.json", "{part}_annotations_vqa_format.json")
    write_vqa(root / "textvqa", *shipped, "train_images/{id}.jpg", names="{part}_text{id}")
    write_vqa(
        root / "vizwiz", *shipped, "{part}/{id}", names="VizWiz_{part}_{id}.jpg", has_ids=False
    )
    write_memes(root / "hatefulmemes")
    return {folder.name: str(folder) for folder in sorted(root.iterdir())}


def write_karpathy(folder: Path, file: str, *, is_coco: bool) -> None:
    images = []
    splits = ["train"] * TRAIN + ["restval", "val"] + ["test"] * TEST
    for number, split in enumerate(splits):
        name = f"{number:04d}.jpg"
        where = ("train2014" if split == "train" else "val2014") if is_coco else "flickr30k-images"
        write_image(folder / where / name, number)
        captions = [f" a {split} thing {number}. ", f"one more {split} {number}"]
        entry: dict[str, Any] = {
            "filename": name,
            "split": split,
            "imgid": number,
            "sentences": [{"raw": caption} for caption in captions],
        }
        if is_coco:
            entry |= {"filepath": where, "cocoid": 1000 + number}
        images.append(entry)
    write_json(folder / file, {"images": images})


def write_vqa(
    folder: Path,
    questions: str,
    annotations: str,
    image: str,
    *,
    names: str | None = None,
    has_ids: bool = True,
    has_raw: bool = False,
) -> None:
    for part, count in (("train", TRAIN), ("val", TEST)):
        asked, answered = [], []
        for number in range(count):
            name = number if names is None else names.format(part=part, id=number)
            write_image(folder / image.format(part=part, id=name), number)
            asked.append({"question_id": number, "image_id": name, "question": f"{part} {number}?"})
            texts = [f"t{number}"] * 10 if part == "train" else ANSWERS[number]
            answered.append({"question_id": number, "answers": annotated(texts, has_ids, has_raw)})
        write_json(folder / questions.format(part=part), {"questions": asked})
        # In another order than the questions: they belong together by their number.
        write_json(folder / annotations.format(part=part), {"annotations": answered[::-1]})


def annotated(texts: list[str], has_ids: bool, has_raw: bool) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for place, text in enumerate(texts):
        answer: dict[str, Any] = {"answer": text, "answer_confidence": "yes"}
        if has_ids:
            answer["answer_id"] = place + 1
        if has_raw:
            answer["raw_answer"] = text + "s"
        answers.append(answer)
    return answers


def write_memes(folder: Path) -> None:
    for name, count in (("train", TRAIN), ("dev", TEST)):
        rows = []
        for number in range(count):
            image = f"img/{name}{number}.png"
            write_image(folder / image, number)
            text = f"{name} {number}"
            rows.append({"id": number, "img": image, "label": number % 2, "text": text})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
