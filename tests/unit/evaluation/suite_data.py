"""The data sets of the LLaVA suite in their original layouts, each with a few drawn images.

`make_suite_data` writes the twelve data sets as their authors publish them; `make_hub_copies` the
same questions as parquet folders, laid out like the hub repositories that lmms-eval's tasks read.
COCO's images lie once, beside the folders that share them, except for POPE, which has its own.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZES = ((64, 48), (48, 64), (50, 50), (81, 40))
COLOURS = ("red", "green", "blue", "yellow", "black", "white")

DIAGRAMS: dict[str, list[tuple[str, list[str], int]]] = {
    "0.png": [
        ("Which letter is the root?", ["A1", "B1", "C1", "D1"], 0),
        ("What eats the {grass}?", ["cow", "fox", "owl", "hawk"], 1),
        ("How many stages are there?", ["2", "3", "4", "5"], 3),
    ],
    "2.png": [
        ("What is labelled X?", ["stem", "leaf", "root", "seed"], 2),
        ("What is labelled Y?", ["stem", "leaf", "root", "seed"], 1),
    ],
    "10.png": [("What would die first?", ["mouse", "snake", "frog", "none"], 3)],
    "11.png": [],
}
TEST_DIAGRAMS = ("2", "10", "999")

# Image, question, words that were read off it, ten answers.
TEXTS: list[tuple[str, str, list[str], list[str]]] = [
    ("aa01", "what is the brand of this camera?", ["DAKOTA", "5MP"], ["dakota"] * 10),
    ("aa01", "what does it cost?", ["DAKOTA", "5MP"], ["5", "five", "$5"] + ["unanswerable"] * 7),
    ("bb02", "what does the small white text spell?", ["copen", "hagen"], ["copenhagen"] * 10),
    ("bb02", "Who is it by?", ["copen", "hagen"], ["nous les gosses"] * 8 + ["nous"] * 2),
    ("cc03", "what's the time?", ["10:20"], ["10:20"] * 5 + ["ten"] * 5),
    ("dd04", "what is on the label?", [], ["nothing"] * 2 + ["the label"] * 8),
]

# Image, question, answer.
POPE: dict[str, list[tuple[int, str, str]]] = {
    "adversarial": [
        (1, "Is there a snowboard in the image?", "yes"),
        (1, "Is there a backpack in the image?", "no"),
        (2, "Is there a car in the image?", "yes"),
        (2, "Is there a dog in the image?", "no"),
    ],
    "popular": [
        (1, "Is there a snowboard in the image?", "yes"),
        (1, "Is there a dining table in the image?", "no"),
        (2, "Is there a car in the image?", "yes"),
        (2, "Is there a person in the image?", "no"),
    ],
    # As in the release: fewer than the others.
    "random": [
        (1, "Is there a snowboard in the image?", "yes"),
        (1, "Is there a toaster in the image?", "no"),
        (2, "Is there a car in the image?", "yes"),
    ],
}

# Image, question, count, whether it is simple.
COUNTED: list[tuple[str, str, int, bool]] = [
    ("VG_100K/1.jpg", "How many dogs are there?", 2, True),
    ("VG_100K/1.jpg", "How many dogs are asleep?", 0, False),
    ("VG_100K_2/2.jpg", "How many cars?", 15, True),
    ("VG_100K_2/2.jpg", "How many red cars?", 1, False),
    ("VG_100K_2/2.jpg", "How many wheels?", 4, True),
    ("val2014/COCO_val2014_000000000001.jpg", "How many people wear hats?", 3, False),
]

# Image, statement, label.
STATED: list[tuple[str, str, int]] = [
    ("000000085637.jpg", "The oven is at the right side of the cat.", 0),
    ("000000085637.jpg", "The cat is in front of the oven.", 1),
    ("000000085638.jpg", "The dog is under the table.", 1),
    ("000000085638.jpg", "The table is under the dog.", 0),
    ("000000085639.jpg", 'The "sign" is above the car.', 1),
    ("000000085639.jpg", "The car touches the {sign}.", 1),
]

# Image, split, box in pixels (left, top, width, height), expressions.
REFERRED: list[tuple[int, str, list[float], list[str]]] = [
    (11, "val", [25.6, 2.4, 6.4, 7.2], ["the ball", 'ball "on top"']),
    (12, "val", [14.4, 19.2, 19.2, 25.6], ["the box in the middle"]),
    (13, "train", [1.0, 1.0, 10.0, 10.0], ["not asked"]),
    (11, "val", [6.4, 24.0, 32.0, 24.0], ["lower left", "the {mat}", "mat"]),
]
REFERRING = {"refcoco": "unc", "refcoco_plus": "unc", "refcocog": "umd"}

# Image, question, ten answers.
ASKED: list[tuple[int, str, list[str]]] = [
    (1, "What colour is it?", ["red"] * 10),
    (1, "How many are there?", ["2"] * 7 + ["two"] * 3),
    (1, "Is it raining?", ["no"] * 2 + ["yes"] * 8),
    (2, "What is this?", ["cat"] * 5 + ["a cat"] * 5),
    (2, "Where is it?", ["on table", "table"] * 5),
    (2, "Who?", ["t-shirt man"] * 9 + ["man"]),
]

# Image, category, question, reference answer.
TALKED: list[tuple[int, str, str, str]] = [
    (image, category, f"{question} ({image})", f"A reference {category} answer to {image}.")
    for image in (1, 2)
    for category, question in (
        ("conv", "What is the name of this place?"),
        ("detail", "Describe the photo in detail."),
        ("complex", "Why would one go there?"),
    )
]

# Question, options, right option; each pair of lines is one of MMVP's pairs.
PAIRED: list[tuple[str, str, str]] = [
    ("Are the wings open or closed?", "(a) Open (b) Closed", "(a)"),
    ("Are the wings open or closed?", "(a) Open (b) Closed", "(b)"),
    ("Is there a shadow, on the floor?", "(a) Yes (b) No", "(b)"),
    ("Is there a shadow, on the floor?", "(a) Yes (b) No", "(a)"),
    ("Is the dog moving?", "(a) Moving (b) Not moving", "(a)"),
    ("Is the dog moving?", "(a) Moving (b) Not moving", "(b)"),
    ("How many eyes are there?", "(a) 1 (b) 2", "(b)"),
    ("How many eyes are there?", "(a) 1 (b) 2", "(a)"),
]


def make_suite_data(root: Path) -> dict[str, Path]:
    """Write all twelve data sets and return the folder of each."""
    _coco(root / "val2014", "val2014", 2)
    for number, size in zip((11, 12, 13), SIZES, strict=False):
        draw(root / "train2014" / f"COCO_train2014_{number:012d}.jpg", number, size)
    _ai2d(root / "ai2d")
    _textvqa(root / "textvqa")
    _pope(root / "pope")
    _tallyqa(root / "tallyqa")
    _vsr(root / "vsr")
    for name, split_by in REFERRING.items():
        _refcoco(root / name, split_by)
    _vqav2(root / "vqav2")
    _llava_bench_wild(root / "llava_bench_wild")
    _llava_bench_coco(root / "llava_bench_coco")
    _mmvp(root / "mmvp")
    folders = ("ai2d", "textvqa", "pope", "tallyqa", "vsr", *REFERRING, "vqav2")
    return {
        name: root / name for name in (*folders, "llava_bench_wild", "llava_bench_coco", "mmvp")
    }


def draw(path: Path, number: int, size: tuple[int, int]) -> None:
    """Draw an image that differs from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, COLOURS[number % len(COLOURS)])
    pen = ImageDraw.Draw(picture)
    across, down = size
    left, top = across * (number % 5) // 8, down * (number % 3) // 6
    pen.rectangle(
        (left, top, left + across // 3, top + down // 3), fill=COLOURS[(number + 2) % len(COLOURS)]
    )
    pen.ellipse((across // 2, down // 2, across - 2, down - 2), outline="grey", width=2)
    pen.text((2, 2), str(number), fill="grey")
    picture.save(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _coco(folder: Path, part: str, count: int) -> None:
    for number in range(1, count + 1):
        draw(folder / f"COCO_{part}_{number:012d}.jpg", number, SIZES[number % len(SIZES)])


def _ai2d(folder: Path) -> None:
    for number, (name, questions) in enumerate(DIAGRAMS.items()):
        draw(folder / "images" / name, number, SIZES[number % len(SIZES)])
        content = {
            text: {
                "abcLabel": False,
                "answerTexts": answers,
                "correctAnswer": right,
                "questionId": f"{name}-{place}",
            }
            for place, (text, answers, right) in enumerate(questions)
        }
        write_json(folder / "questions" / f"{name}.json", {"imageName": name, "questions": content})
    (folder / "ai2d_test_ids.csv").write_text("\n".join(TEST_DIAGRAMS) + "\n")


def _textvqa(folder: Path) -> None:
    entries, lines, words = [], [], {}
    for number, (image, question, tokens, answers) in enumerate(TEXTS):
        draw(folder / "train_images" / f"{image}.jpg", number, SIZES[number % len(SIZES)])
        entries.append(
            {
                "question": question,
                "image_id": image,
                "image_classes": ["Camera"],
                "question_tokens": question.split(),
                "question_id": 34602 + number,
                "set_name": "val",
                "answers": answers,
            }
        )
        text = (
            f"{question.lower()}\nReference OCR token: {', '.join(tokens)}"
            "\nAnswer the question using a single word or phrase."
        )
        lines.append(
            {
                "question_id": image,
                "image": f"{image}.jpg",
                "text": text,
                "category": "default",
            }
        )
        words[image] = tokens
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": entries})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    ocr = [{"image_id": image, "ocr_tokens": tokens} for image, tokens in words.items()]
    write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})


def _pope(folder: Path) -> None:
    _coco(folder / "val2014", "val2014", 2)
    for part, questions in POPE.items():
        rows = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{image:012d}.jpg",
                "text": text,
                "label": label,
            }
            for number, (image, text, label) in enumerate(questions, start=1)
        ]
        write_lines(folder / f"coco_pope_{part}.json", rows)


def _tallyqa(folder: Path) -> None:
    entries = []
    for number, (image, question, count, is_simple) in enumerate(COUNTED):
        # COCO's images lie beside the folder.
        if image.startswith("VG"):
            draw(folder / image, number, SIZES[number % len(SIZES)])
        entries.append(
            {
                "answer": count,
                "data_source": "amt",
                "image": image,
                "image_id": number,
                "issimple": is_simple,
                "question": question,
                "question_id": 1000 + number,
            }
        )
    write_json(folder / "test.json", entries)


def _vsr(folder: Path) -> None:
    rows = []
    for number, (image, caption, label) in enumerate(STATED):
        draw(folder / "images" / image, number, SIZES[number % len(SIZES)])
        rows.append(
            {
                "image": image,
                "image_link": f"http://images.example/{image}",
                "caption": caption,
                "label": label,
                "relation": "under",
                "subj": "cat",
                "obj": "oven",
            }
        )
    write_lines(folder / "test.jsonl", rows)


def _refcoco(folder: Path, split_by: str) -> None:
    folder.mkdir(parents=True)
    references, annotations = [], []
    for number, (image, split, box, expressions) in enumerate(REFERRED):
        references.append(
            {
                "ref_id": number,
                "ann_id": 500 + number,
                "category_id": 1,
                "image_id": image,
                "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
                "split": split,
                "sent_ids": list(range(len(expressions))),
                "sentences": [
                    {"tokens": text.split(), "raw": text, "sent_id": place, "sent": text}
                    for place, text in enumerate(expressions)
                ],
            }
        )
        annotations.append(
            {
                "id": 500 + number,
                "image_id": image,
                "category_id": 1,
                "bbox": box,
                "segmentation": [[1, 2, 3, 4]],
            }
        )
    # As Python 2 wrote it.
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(references, protocol=2))
    images = [
        {"id": image, "width": size[0], "height": size[1], "file_name": "x.jpg"}
        for image, size in zip((11, 12, 13), SIZES, strict=False)
    ]
    content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    write_json(folder / "instances.json", content)


def _vqav2(folder: Path) -> None:
    questions, annotations = [], []
    for number, (image, question, answers) in enumerate(ASKED):
        key = {"question_id": 100 + number, "image_id": image}
        questions.append(key | {"question": question})
        given = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place, answer in enumerate(answers, start=1)
        ]
        annotations.append(
            key | {"answers": given, "answer_type": "other", "question_type": "what is"}
        )
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"info": {}, "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations[::-1]})


def _llava_bench_wild(folder: Path) -> None:
    for number in (1, 2):
        draw(folder / "images" / f"{number:03d}.jpg", number, SIZES[number])
    questions, answers = _talk("{:03d}.jpg")
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "answers_gpt4.jsonl", answers)
    contexts = [
        {"id": f"{number:03d}", "image": f"{number:03d}.jpg", "caption": f"A scene {number}."}
        for number in (1, 2)
    ]
    write_lines(folder / "context.jsonl", contexts)


def _llava_bench_coco(folder: Path) -> None:
    questions, answers = _talk("{:012d}.jpg")
    write_lines(folder / "qa90_questions.jsonl", questions)
    write_lines(folder / "qa90_gpt4_answer.jsonl", answers)
    contexts = [
        {
            "id": f"{number:012d}",
            "image": f"{number:012d}.jpg",
            "captions": [f"A street {number}.", "A car."],
            "instances": [
                {"category": "car", "bbox": [0.1, 0.2, 0.3, 0.4]},
                {"category": "dog", "bbox": [0.5, 0.5, 0.75, 1.0]},
            ],
        }
        for number in (1, 2, 3)
    ]
    write_lines(folder / "caps_boxes_coco2014_val_80.jsonl", contexts)


def _talk(image: str) -> tuple[list[Any], list[Any]]:
    questions = [
        {"question_id": number, "image": image.format(of), "text": text, "category": category}
        for number, (of, category, text, _) in enumerate(TALKED)
    ]
    answers = [
        {"question_id": number, "text": answer, "model_id": "gpt-4"}
        for number, (_, _, _, answer) in enumerate(TALKED)
    ]
    return questions, answers


def _mmvp(folder: Path) -> None:
    lines = ["Index,Question,Options,Correct Answer"]
    for number, (question, options, right) in enumerate(PAIRED, start=1):
        draw(folder / "MMVP Images" / f"{number}.jpg", number, SIZES[number % len(SIZES)])
        lines.append(f'{number},"{question}",{options},{right}')
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_hub_copies(root: Path) -> dict[str, Path]:
    """Write the data of lmms-eval's own tasks as folders like their hub repositories.

    The columns are those that the tasks of lmms-eval 0.7.3 read; each folder holds
    `data/<split>-00000-of-00001.parquet`, with the images inside.
    """
    images = make_suite_data(root / "originals")
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "ai2d": ("test", _hub_ai2d(images["ai2d"])),
        "textvqa": ("validation", _hub_textvqa(images["textvqa"])),
        "pope": ("test", _hub_pope(images["pope"])),
        "vqav2": ("validation", _hub_vqav2(root / "originals" / "val2014")),
        "llava_bench_wild": ("train", _hub_talk(images["llava_bench_wild"] / "images", "{:03d}")),
        "llava_bench_coco": (
            "train",
            _hub_talk(root / "originals" / "val2014", "COCO_val2014_{:012d}"),
        ),
        "mmvp": ("train", _hub_mmvp(images["mmvp"])),
    }
    rows |= {name: ("val", _hub_refcoco(root / "originals" / "train2014")) for name in REFERRING}
    return {name: _write_hub(root / name, split, found) for name, (split, found) in rows.items()}


def _write_hub(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    plain = Dataset.from_list(rows)
    features = Features({**plain.features, "image": ImageFeature()})
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(str(path))
    return folder


def _stored(path: Path) -> dict[str, Any]:
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path.with_suffix(".png").name}


def _hub_ai2d(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "question": question,
            "options": answers,
            "answer": str(right),
            "image": _stored(folder / "images" / name),
        }
        for name, questions in DIAGRAMS.items()
        if name.removesuffix(".png") in TEST_DIAGRAMS
        for question, answers, right in questions
    ]


def _hub_textvqa(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "question_id": 34602 + number,
            "question": question,
            "image": _stored(folder / "train_images" / f"{image}.jpg"),
            "answers": answers,
            # Never empty in the first rows, where the column gets its type.
            "ocr_tokens": tokens,
            "set_name": "val",
        }
        for number, (image, question, tokens, answers) in enumerate(TEXTS)
    ]


def _hub_pope(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{part}-{number}",
            "question_id": str(number),
            "question": text,
            "answer": label,
            "image_source": f"COCO_val2014_{image:012d}",
            "image": _stored(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg"),
            "category": part,
        }
        for part, questions in POPE.items()
        for number, (image, text, label) in enumerate(questions, start=1)
    ]


def _hub_vqav2(images: Path) -> list[dict[str, Any]]:
    return [
        {
            "question_type": "what is",
            "multiple_choice_answer": max(answers, key=answers.count),
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                for place, answer in enumerate(answers, start=1)
            ],
            "image_id": image,
            "answer_type": "other",
            "question_id": 100 + number,
            "question": question,
            "image": _stored(images / f"COCO_val2014_{image:012d}.jpg"),
        }
        for number, (image, question, answers) in enumerate(ASKED)
    ]


def _hub_refcoco(images: Path) -> list[dict[str, Any]]:
    return [
        {
            "question_id": str(500 + number),
            "image": _stored(images / f"COCO_train2014_{image:012d}.jpg"),
            "question": "Please carefully observe the area circled in the image.",
            "answer": expressions,
            "segmentation": [1.0, 2.0, 3.0, 4.0],
            "bbox": box,
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        }
        for number, (image, split, box, expressions) in enumerate(REFERRED)
        if split == "val"
    ]


def _hub_talk(images: Path, name: str) -> list[dict[str, Any]]:
    return [
        {
            "question_id": number,
            "question": text,
            "category": category,
            "image_id": name.format(image),
            "image": _stored(images / f"{name.format(image)}.jpg"),
            "caption": f"A scene {image}.",
            "gpt_answer": answer,
            # The task of the COCO questions reads both names.
            "answer": answer,
        }
        for number, (image, category, text, answer) in enumerate(TALKED)
    ]


def _hub_mmvp(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "Index": number,
            "Question": question,
            "Options": options,
            "Correct Answer": right,
            "image": _stored(folder / "MMVP Images" / f"{number}.jpg"),
        }
        for number, (question, options, right) in enumerate(PAIRED, start=1)
    ]
