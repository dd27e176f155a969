"""Reading the seven layouts and writing tasks, without lmms-eval."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewshot_data import TEST, TRAIN, write_all, write_karpathy, write_memes, write_vqa

from kuea_mllm.config.evaluate import FewShotSettings
from kuea_mllm.errors import DataError, EvaluationError
from kuea_mllm.evaluation.fewshot import json_stream, scoring, task_files
from kuea_mllm.evaluation.fewshot.datasets import DATASETS
from kuea_mllm.evaluation.fewshot.json_stream import stream_entries
from kuea_mllm.evaluation.fewshot.plan import read_plan
from kuea_mllm.evaluation.fewshot.task_files import require_inputs, write_fewshot_tasks
from kuea_mllm.evaluation.fewshot.vqa_accuracy import vqa_accuracy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", DATASETS)
def test_every_layout_is_read(name: str, data: dict[str, str]) -> None:
    folder = Path(data[name])
    train, test = DATASETS[name].read(folder, "train"), DATASETS[name].read(folder, "test")
    assert (len(train), len(test)) == (TRAIN, TEST)
    assert all(Path(example.image).is_file() for example in [*train, *test])
    assert not {example.image for example in train} & {example.image for example in test}


def test_captions_keep_their_first_reference_first(data: dict[str, str]) -> None:
    example = DATASETS["coco"].read(Path(data["coco"]), "test")[0]
    assert example.captions == (" a test thing 8. ", "one more test 8")
    assert example.image_id == "1008"


def test_answers_belong_to_their_question(data: dict[str, str]) -> None:
    # The annotations stand in another order than the questions.
    examples = DATASETS["vqav2"].read(Path(data["vqav2"]), "train")
    assert [(e.question, e.answers[0]) for e in examples[:2]] == [
        ("train 0?", "t0"),
        ("train 1?", "t1"),
    ]
    assert examples[0].entries == tuple(range(10))
    vizwiz = DATASETS["vizwiz"].read(Path(data["vizwiz"]), "test")
    assert vizwiz[1].entries == (0,) * 8 + (8,) * 2


def test_same_annotations_are_found_as_the_published_scorer_finds_them(tmp_path: Path) -> None:
    # It compares annotations after it has normalised their answers in place.
    texts = ["two", "2", "Two.", "the 2", "two", "three", "3", "dog", "a dog", "cat"]
    sure = ["yes"] * 4 + ["maybe"] + ["yes"] * 5
    annotations = [
        {"answer": text, "answer_confidence": word} for text, word in zip(texts, sure, strict=True)
    ]
    question = {"question_id": 1, "image_id": "x.jpg", "question": "?"}
    (tmp_path / "val_questions_vqa_format.json").write_text(json.dumps({"questions": [question]}))
    content = {"annotations": [{"question_id": 1, "answers": annotations}]}
    file = tmp_path / "val_annotations_vqa_format.json"
    file.write_text(json.dumps(content))
    example = DATASETS["vizwiz"].read(tmp_path, "test")[0]
    assert example.entries == (0, 0, 0, 0, 4, 5, 5, 7, 7, 9)
    assert example.answers == tuple(texts)
    # "2": of the first four only the fifth is another one that agrees, and so on.
    scores = [1 / 3] * 4 + [1] + [1] * 5
    assert vqa_accuracy("2", example.answers, example.entries) == pytest.approx(sum(scores) / 10)
    for place, annotation in enumerate(annotations):
        annotation["answer_id"] = str(place)
    file.write_text(json.dumps(content))
    assert DATASETS["vizwiz"].read(tmp_path, "test")[0].entries == tuple(range(10))


def test_memes_are_read_from_each_name_of_their_file(tmp_path: Path) -> None:
    write_memes(tmp_path)
    read = DATASETS["hatefulmemes"].read
    expected = read(tmp_path, "test")
    (tmp_path / "dev.jsonl").rename(tmp_path / "dev_seen.jsonl")
    assert read(tmp_path, "test") == expected
    rows = [json.loads(line) for line in (tmp_path / "dev_seen.jsonl").read_text().splitlines()]
    (tmp_path / "dev_seen.jsonl").unlink()
    (tmp_path / "dev.json").write_text(json.dumps({"annotations": rows}))
    assert read(tmp_path, "test") == expected
    (tmp_path / "dev.json").unlink()
    with pytest.raises(DataError, match=r"dev\.jsonl does not exist"):
        read(tmp_path, "test")


def test_meme_may_hold_any_line_separator(tmp_path: Path) -> None:
    write_memes(tmp_path)
    path = tmp_path / "dev.jsonl"
    text = "one\u2028two\x85three"
    row = {"id": 9, "img": "img/dev0.png", "label": 1, "text": text}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n\n")
    assert DATASETS["hatefulmemes"].read(tmp_path, "test")[-1].question == text


def _drop_key(content: Any) -> None:
    del content["images"][0]["sentences"]


def _no_captions(content: Any) -> None:
    content["images"][0]["sentences"] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_drop_key, "key 'sentences'"), (_no_captions, r"image 0000\.jpg has no sentences")],
)
def test_damaged_karpathy_file_is_named(
    damage: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    write_karpathy(tmp_path, "dataset_coco.json", is_coco=True)
    file = tmp_path / "dataset_coco.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"dataset_coco\.json.*" + message):
        DATASETS["coco"].read(tmp_path, "train")
    file.write_text("{")
    with pytest.raises(DataError, match=r"dataset_coco\.json cannot be read"):
        DATASETS["coco"].read(tmp_path, "train")


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
def test_streamed_list_equals_the_parsed_one(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", window)
    entries = [{"a": [1, 2.5, None]}, 'x, ]} \\ \u00e9 "', 12345, -1.5e3, [], {}, True]
    content = {"info": {"entries": [0]}, "entries": entries, "license": [1, {"b": 2}]}
    file = tmp_path / "x.json"
    for indent in (None, 2):
        file.write_text(json.dumps(content, indent=indent) + "\n")
        assert list(stream_entries(file, "entries")) == entries
        assert list(stream_entries(file, "license")) == content["license"]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"x": [1, 2', '{"x": [1 2]}', '{"x": [1]', '{"x": [1]} {', '{"x" [1]}', "nothing"],
)
def test_file_that_is_cut_short_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json cannot be read: .*\.$"):
        list(stream_entries(tmp_path / "x.json", "x"))


def test_file_of_another_shape_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "dataset_coco.json"
    for text, problem in (
        ('{"y": []}', "key 'images'"),
        ("[]", "an object"),
        ('{"images": 1}', "no list"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=f"not laid out as expected: .*{problem}"):
            DATASETS["coco"].read(tmp_path, "train")


def test_question_without_answers_is_named(tmp_path: Path) -> None:
    write_vqa(
        tmp_path,
        "{part}_questions_vqa_format.json",
        "{part}_annotations_vqa_format.json",
        "train_images/{id}.jpg",
        names="{part}{id}",
    )
    file = tmp_path / "val_annotations_vqa_format.json"
    content = json.loads(file.read_text())
    content["annotations"].pop(0)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"val_annotations.* has no answers to question 3"):
        DATASETS["textvqa"].read(tmp_path, "test")


def test_missing_folder_is_asked_for_by_its_key(data: dict[str, str], tmp_path: Path) -> None:
    settings = FewShotSettings(datasets=["vqav2", "vizwiz"])
    with pytest.raises(EvaluationError, match=r"vizwiz has no folder.*\n.*--set data\.vizwiz=DIR"):
        require_inputs(settings, {"vqav2": data["vqav2"]})
    with pytest.raises(
        EvaluationError, match=r"folder .*nowhere of data set vizwiz does not exist"
    ):
        require_inputs(settings, {**data, "vizwiz": str(tmp_path / "nowhere")})


def test_missing_java_is_said_before_anything_else(
    data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EvaluationError, match="no `java` on the PATH"):
        require_inputs(FewShotSettings(datasets=["coco"]), data)
    require_inputs(FewShotSettings(datasets=["vqav2"]), data)


def test_ok_vqa_is_refused_without_language_data(
    data: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    message = "NLTK's data punkt_tab, averaged_perceptron_tagger_eng, wordnet"
    with pytest.raises(EvaluationError, match=message):
        require_inputs(FewShotSettings(datasets=["okvqa"]), data)


def test_missing_images_are_counted(tmp_path: Path) -> None:
    write_memes(tmp_path / "memes")
    for number in (1, 2):
        (tmp_path / "memes" / "img" / f"dev{number}.png").unlink()
    settings = FewShotSettings(datasets=["hatefulmemes"], shots=[2])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"img/dev1\.png does not exist, nor do 1 others"):
        write_fewshot_tasks(tmp_path / "out", settings, {"hatefulmemes": str(tmp_path / "memes")})


def test_memes_of_one_class_cannot_be_scored(data: dict[str, str], tmp_path: Path) -> None:
    settings = FewShotSettings(datasets=["hatefulmemes"], shots=[2])
    with pytest.raises(EvaluationError, match="both classes, and the 1 documents"):
        write_fewshot_tasks(tmp_path, settings, data, limit=1)


def write(folder: Path, data: dict[str, str], **settings: Any) -> dict[str, list[list[int]]]:
    """Write tasks and return their demonstrations by name."""
    folder.mkdir()
    tasks = write_fewshot_tasks(folder, FewShotSettings(**settings), data)
    plans = {task.name: read_plan(folder / f"{task.name}.json") for task in tasks}
    return {name: plan.demonstrations.tolist() for name, plan in plans.items()}


def test_one_task_is_written_per_shots_and_trial(data: dict[str, str], tmp_path: Path) -> None:
    plans = write(tmp_path / "a", data, datasets=["vqav2"], shots=[0, 2], trials=2, seed=7)
    assert list(plans) == [f"vqav2_{k}shot_seed{s}" for s in (7, 8) for k in (0, 2)]
    text = (tmp_path / "a" / "vqav2_2shot_seed7.yaml").read_text()
    assert "!function 'kuea_mllm.evaluation.fewshot.scoring.process_vqa'" in text
    generation = yaml.safe_load(text.replace("!function ", ""))["generation_kwargs"]
    assert generation["num_beams"] == 3
    assert generation["length_penalty"] == 0.0
    assert generation["max_new_tokens"] == 5


def test_length_penalty_of_a_recipe_reaches_the_task(data: dict[str, str], tmp_path: Path) -> None:
    settings = FewShotSettings(datasets=["vqav2"], shots=[2], length_penalty=-2.0)
    (task,) = write_fewshot_tasks(tmp_path, settings, data)
    text = task.path.read_text().replace("!function ", "")
    assert yaml.safe_load(text)["generation_kwargs"]["length_penalty"] == -2.0


@pytest.mark.parametrize("compat", ["correct", "released"])
def test_tasks_hold_what_the_limit_leaves(
    compat: Any, data: dict[str, str], tmp_path: Path
) -> None:
    settings = FewShotSettings(datasets=["vqav2"], shots=[1, 3], compat=compat)
    plans = []
    for limit in (None, 2):
        folder = tmp_path / str(limit)
        folder.mkdir()
        tasks = write_fewshot_tasks(folder, settings, data, limit=limit)
        plans.append([read_plan(t.path.with_suffix(".json")).demonstrations for t in tasks])
        assert len((folder / "vqav2.jsonl").read_text().splitlines()) == (limit or TEST)
    # Not another draw: the first rows of the whole one.
    for whole, part in zip(*plans, strict=True):
        assert (whole[:2] == part).all()
    # Fewer shots are the first of more by default; the published code draws anew for each.
    assert (plans[0][0] == plans[0][1][:, :1]).all() == (compat == "correct")


def test_content_of_a_task_is_known_again(data: dict[str, str], tmp_path: Path) -> None:
    settings = FewShotSettings(datasets=["vizwiz"], shots=[2])
    changed = shutil.copytree(data["vizwiz"], tmp_path / "vizwiz")
    found = []
    for number, folder in enumerate((data["vizwiz"], data["vizwiz"], str(changed))):
        (tmp_path / str(number)).mkdir()
        found += write_fewshot_tasks(tmp_path / str(number), settings, {"vizwiz": folder})
    assert found[0].content == found[1].content != found[2].content


def test_prompts_and_images_of_a_task_follow_its_plan(data: dict[str, str], tmp_path: Path) -> None:
    plans = write(tmp_path / "a", data, datasets=["vqav2"], shots=[0, 2])
    for name, images in (("vqav2_0shot_seed42", 1), ("vqav2_2shot_seed42", 3)):
        kwargs = {"plan": str(tmp_path / "a" / f"{name}.json")}
        prompt = scoring.doc_to_text({"number": 1}, kwargs)
        first, second = plans[name][1]
        tag = "<image>" if images == 3 else ""
        assert prompt == (
            f"{tag}Question:train {first}? Short answer:t{first}<|endofchunk|>\n"
            f"{tag}Question:train {second}? Short answer:t{second}<|endofchunk|>\n"
            "<image>Question:val 1? Short answer:"
        )
        found = [Path(image.path).name for image in scoring.doc_to_visual({"number": 1}, kwargs)]
        shown = [f"COCO_train2014_{i:012d}.jpg" for i in (first, second)]
        assert found == ([*shown, "COCO_val2014_000000000001.jpg"])[-images:]


def test_random_subset_of_documents_is_the_seeds(data: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "a", data, datasets=["vqav2"], shots=[2], trials=2, num_samples=2)
    rows = [
        [json.loads(line)["document"] for line in file.read_text().splitlines()]
        for file in sorted((tmp_path / "a").glob("vqav2_seed*.jsonl"))
    ]
    assert [len(row) for row in rows] == [2, 2]
    assert all(row == sorted(row) for row in rows)


def test_images_of_documents_beyond_the_limit_may_be_missing(tmp_path: Path) -> None:
    write_memes(tmp_path / "memes")
    (tmp_path / "memes" / "img" / "dev3.png").unlink()
    (tmp_path / "out").mkdir()
    settings = FewShotSettings(datasets=["hatefulmemes"], shots=[2])
    data = {"hatefulmemes": str(tmp_path / "memes")}
    assert len(write_fewshot_tasks(tmp_path / "out", settings, data, limit=3)) == 1


def test_stems_are_read_off_the_annotations(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_files, "load_language", lambda: None)
    write(tmp_path / "a", data, datasets=["okvqa"], shots=[2])
    stems = json.loads((tmp_path / "a" / "okvqa_stems.json").read_text())
    assert stems == {f"t{number}s": f"t{number}" for number in range(TRAIN)}
