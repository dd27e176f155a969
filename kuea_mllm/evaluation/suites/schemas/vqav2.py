"""VQAv2, read by the readers of the few-shot evaluation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.fewshot.schemas import VqaFiles, read_vqa
from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.documents import REMEDY, Document
from kuea_mllm.evaluation.suites.schemas.reading import bad_layout, image_folder

QUESTIONS = "v2_OpenEnded_mscoco_{part}2014_questions.json"
ANNOTATIONS = "v2_mscoco_{part}2014_annotations.json"


def read_vqav2(folder: Path) -> list[Document]:
    """Read the validation questions of VQAv2.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    # Absolute, so that it holds where the images lie beside the folder.
    images = str(image_folder(folder, "val2014").absolute())
    escaped = images.replace("{", "{{").replace("}", "}}")
    files = VqaFiles(QUESTIONS, ANNOTATIONS, f"{escaped}/COCO_val2014_{{id:012d}}.jpg")
    try:
        examples = read_vqa(folder, "test", files=files)
    except DataError as error:
        raise DataError(error.problem, REMEDY) from error
    if not examples:
        raise bad_layout(folder / QUESTIONS.format(part="val"), "it holds no entries")
    return [
        Document(
            image=example.image,
            image_id=example.image_id,
            prompt=prompts.short_answer(example.question),
            target=Counter(example.answers).most_common(1)[0][0],
            extra={"answers": list(example.answers)},
        )
        for example in examples
    ]
