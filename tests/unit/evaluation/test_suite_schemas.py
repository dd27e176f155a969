"""Readers of the LLaVA suite: prompts character for character, and every kind of bad input."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suite_data import make_suite_data, write_json, write_lines

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites.documents import (
    Document,
    document_row,
    require_images,
    to_target,
    to_text,
    to_visual,
)
from kuea_mllm.evaluation.suites.schemas.refcoco import load_plain_pickle
from kuea_mllm.evaluation.suites.sources import SOURCES

PAPER, TEXT = SOURCES["paper"], SOURCES["lmms-eval"]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suites")
    make_suite_data(root)
    return root


@pytest.fixture
def root(kept: Path, tmp_path: Path) -> Path:
    """Return a copy that may be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "data"))


def read(root: Path, column: str, sources: Any = PAPER) -> list[Document]:
    source = sources[column]
    return list(source.read(root / source.dataset))


@pytest.mark.parametrize(
    ("column", "place", "prompt", "target"),
    [
        ("AI2D", 1, f"What eats the {{grass}}?\nA. cow\nB. fox\nC. owl\nD. hawk{LETTER}", "B"),
        (
            "text-ocr",
            0,
            f"what is the brand of this camera?\nReference OCR token: DAKOTA, 5MP{SHORT}",
            "dakota",
        ),
        ("text-ocr", 5, f"what is on the label?\nReference OCR token: {SHORT}", "the label"),
        ("text-pure", 0, f"what is the brand of this camera?{SHORT}", "dakota"),
        ("pope", 1, f"Is there a backpack in the image?{SHORT}", "No"),
        (
            "tallyQA",
            2,
            "How many cars?\nA. 0\nB. 1\nC. 2\nD. 3\nE. 4\nF. 5\nG. 6\nH. 7\nI. 8\nJ. 9\nK. 10"
            f"\nL. 11\nM. 12\nN. 13\nO. 14\nP. 15{LETTER}",
            "P",
        ),
        (
            "vsr",
            4,
            'Based on the image, is this statement "True" or "False"? The "sign" is above the car.'
            '\nRespond with "True" or "False" directly.',
            "True",
        ),
        (
            "RefCOCO",
            4,
            "Please provide the bounding box coordinate of the region this sentence describes: "
            '"the {mat}"',
            "[0.10, 0.50, 0.60, 1.00]",
        ),
        ("vqa-v2", 2, f"Is it raining?{SHORT}", "yes"),
        ("llava-wild", 3, "What is the name of this place? (2)", "A reference conv answer to 2."),
        ("llava-coco", 1, "Describe the photo in detail. (1)", "A reference detail answer to 1."),
        ("MMVP", 2, "Is there a shadow, on the floor? (a) Yes (b) No", "(b)"),
    ],
)
def test_prompts_are_those_of_the_papers_harness(
    column: str, place: int, prompt: str, target: str, kept: Path
) -> None:
    row = document_row(read(kept, column)[place])
    assert to_text(row) == prompt
    assert to_target(row) == target


def test_refcoco_plus_and_refcocog_ask_as_refcoco_does(kept: Path) -> None:
    asked = [[d.prompt for d in read(kept, c)] for c in ("RefCOCO", "RefCOCO+", "RefCOCOg")]
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 6


def test_the_lmms_eval_protocol_asks_for_written_answers(kept: Path) -> None:
    counted, stated = read(kept, "tallyQA", TEXT)[2], read(kept, "vsr", TEXT)[0]
    assert (counted.prompt, counted.target) == (f"How many cars?{SHORT}", "15")
    assert stated.prompt == read(kept, "vsr")[0].prompt
    assert (stated.target, stated.candidates) == ("False", ())


@pytest.mark.parametrize("protocol", SOURCES)
def test_candidates_of_documents_are_those_of_the_task(protocol: str, kept: Path) -> None:
    for column, source in SOURCES[protocol].items():
        documents = read(kept, column, SOURCES[protocol])
        assert {d.candidates for d in documents} == {tuple(source.generation.get("candidates", ()))}
        for document in documents:
            assert not document.candidates or document.target in document.candidates
            assert Path(document.image).is_absolute()
        require_images(documents, source.dataset)


def test_padded_differs_from_paper_in_the_box_columns_alone() -> None:
    differing = {c for c, s in SOURCES["padded"].items() if s.process != PAPER[c].process}
    assert differing == {"RefCOCO", "RefCOCO+", "RefCOCOg"}
    assert sum(source.documents for source in PAPER.values()) == 15_501 + 2 * 5_000 + 8_910 + (
        38_589 + 1_222 + 4_896 + 10_758 + 10_834 + 214_354 + 60 + 90 + 300
    )


def test_groups_and_units(kept: Path) -> None:
    assert [d.group for d in read(kept, "AI2D")] == ["val"] * 3 + ["test"] * 3
    pope = [d.group for d in read(kept, "pope")]
    assert pope == ["adversarial"] * 4 + ["popular"] * 4 + ["random"] * 3
    assert [d.group for d in read(kept, "tallyQA")] == ["simple", "complex"] * 3
    assert [d.unit for d in read(kept, "MMVP")][:4] == ["pair 1", "pair 1", "pair 2", "pair 2"]


def test_a_judge_is_given_captions_and_boxes_of_coco_and_the_caption_in_the_wild(
    kept: Path,
) -> None:
    coco, wild = read(kept, "llava-coco")[3], read(kept, "llava-wild")[3]
    assert coco.extra == {
        "question": "What is the name of this place? (2)",
        "reference_answer": "A reference conv answer to 2.",
        "context": "A street 2.\nA car.\n\ncar: [0.1, 0.2, 0.3, 0.4]\ndog: [0.5, 0.5, 0.75, 1.0]",
        "category": "conv",
    }
    assert coco.image.endswith("val2014/COCO_val2014_000000000002.jpg")
    assert wild.extra["context"] == "A scene 2."


def test_textvqa_words_come_from_its_own_ocr_file_without_that_of_llava(root: Path) -> None:
    folder = root / "textvqa"
    before = [d.prompt for d in read(root, "text-ocr")]
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    after = [d.prompt for d in read(root, "text-ocr")]
    # LLaVA's file holds questions in small letters.
    assert [p.lower() for p in after] == [p.lower() for p in before]
    assert after[3] == f"Who is it by?\nReference OCR token: copen, hagen{SHORT}"
    assert read(root, "text-pure")[3].prompt == f"Who is it by?{SHORT}"
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(DataError, match=r"neither llava_textvqa.* nor TextVQA_Rosetta"):
        read(root, "text-ocr")
    assert len(read(root, "text-pure")) == 6


def test_llavas_texts_without_the_instruction_are_read_the_same(root: Path) -> None:
    before = read(root, "text-ocr")
    path = root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row | {"text": row["text"].removesuffix(SHORT)} for row in rows])
    assert read(root, "text-ocr") == before
    # Under the name that the paper's harness gives its copy.
    path.rename(path.with_name("textvqa_val_v051_ocr.jsonl"))
    (path.parent / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert read(root, "text-ocr") == before


def test_refcoco_is_read_from_json_as_from_its_pickle(root: Path) -> None:
    before = read(root, "RefCOCO")
    path = root / "refcoco" / "refs(unc).p"
    write_json(path.with_suffix(".json"), pickle.loads(path.read_bytes()))
    path.unlink()
    assert read(root, "RefCOCO") == before


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    # Protocol 0 with a byte string and a unicode string, as Python 2 writes them.
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nVa caf\\u00e9\np3\nsa.")
    assert load_plain_pickle(tmp_path / "refs.p") == [{"sent": "a caf\u00e9"}]


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(root: Path) -> None:
    trace = root / "was_here"
    path = root / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps([Attack(trace)]))
    with pytest.raises(
        DataError, match=r"refs\(unc\)\.p cannot be read: .*only plain data is read"
    ):
        read(root, "RefCOCO")
    assert not trace.exists()
    for content in (b"", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04K", b"]" * 3, b"P1\n."):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"refs\(unc\)\.p"):
            read(root, "RefCOCO")


def test_images_are_found_in_the_folder_or_beside_it(root: Path) -> None:
    assert str(root / "val2014") in read(root, "vqa-v2")[0].image
    shutil.copytree(root / "val2014", root / "vqav2" / "val2014")
    assert str(root / "vqav2" / "val2014") in read(root, "vqa-v2")[0].image


def test_a_folder_with_braces_in_its_name_is_read(kept: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(kept, tmp_path / "{x}"))
    require_images(read(odd, "vqa-v2"), "vqav2")


def test_a_relative_folder_gives_absolute_images(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept / "pope")
    documents = PAPER["pope"].read(Path())
    assert documents[0].image == str(kept / "pope/val2014/COCO_val2014_000000000001.jpg")


def test_mmvp_keeps_the_answers_of_its_own_file(root: Path) -> None:
    assert [d.target for d in read(root, "MMVP")][:4] == ["(a)", "(b)", "(b)", "(a)"]


def edit_json(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        write_json(path, change(content) or content)

    return edit


def edit_lines(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        write_lines(path, rows)

    return edit


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


FILES = {
    "AI2D": ["ai2d/ai2d_test_ids.csv"],
    "text-ocr": ["textvqa/TextVQA_0.5.1_val.json"],
    "pope": [f"pope/coco_pope_{part}.json" for part in ("adversarial", "popular", "random")],
    "tallyQA": ["tallyqa/test.json"],
    "vsr": ["vsr/test.jsonl"],
    "RefCOCO": ["refcoco/refs(unc).p", "refcoco/instances.json"],
    "RefCOCOg": ["refcocog/refs(umd).p"],
    "vqa-v2": [
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        "vqav2/v2_mscoco_val2014_annotations.json",
    ],
    "llava-wild": [
        f"llava_bench_wild/{name}.jsonl" for name in ("questions", "answers_gpt4", "context")
    ],
    "llava-coco": [
        "llava_bench_coco/qa90_questions.jsonl",
        "llava_bench_coco/qa90_gpt4_answer.jsonl",
        "llava_bench_coco/caps_boxes_coco2014_val_80.jsonl",
    ],
    "MMVP": ["mmvp/Questions.csv"],
}


@pytest.mark.parametrize(("column", "file"), [(c, f) for c, files in FILES.items() for f in files])
def test_a_missing_or_damaged_file_is_named(column: str, file: str, root: Path) -> None:
    path = root / file
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError) as missing:
        read(root, column)
    assert missing.value.problem == f"file {path} does not exist."
    assert "docs/evaluation.md" in missing.value.remedy
    # Neither text nor a pickle, and nothing at all.
    for damage in (b"\xff\xfe" + content, b""):
        path.write_bytes(damage)
        with pytest.raises(DataError) as damaged:
            read(root, column)
        assert str(path) in damaged.value.problem
        assert "docs/evaluation.md" in damaged.value.remedy


@pytest.mark.parametrize(
    "file",
    [f for files in FILES.values() for f in files if not f.endswith((".csv", ".p"))],
)
def test_a_file_that_is_cut_short_is_refused(file: str, root: Path) -> None:
    column = next(column for column, files in FILES.items() if file in files)
    cut(root / file)
    with pytest.raises(DataError, match="is it cut short") as error:
        read(root, column)
    assert str(root / file) in error.value.problem


def set_in(place: int, **values: Any) -> Callable[[list[Any]], None]:
    return lambda rows: rows[place].update(values)


def drop(place: int, key: str) -> Callable[[list[Any]], None]:
    def edit(rows: list[Any]) -> None:
        del rows[place][key]

    return edit


@pytest.mark.parametrize(
    ("column", "file", "edit", "problem"),
    [
        (
            "AI2D",
            "ai2d/questions/2.png.json",
            edit_json(
                lambda c: c["questions"]["What is labelled Y?"].pop("correctAnswer") and None
            ),
            "entry 2: key 'correctAnswer' is missing",
        ),
        (
            "AI2D",
            "ai2d/questions/2.png.json",
            replace_text('"seed"]', '"seed", "more"]'),
            "5 choices with the right one at 2",
        ),
        ("AI2D", "ai2d/questions/2.png.json", replace_text("questions", "x"), "key 'questions'"),
        ("AI2D", "ai2d/questions/2.png.json", replace_text('"2.png"', '"../2.png"'), "not lie in"),
        ("AI2D", "ai2d/ai2d_test_ids.csv", replace_text("2", "two"), "invalid literal"),
        (
            "text-ocr",
            "textvqa/TextVQA_0.5.1_val.json",
            edit_json(lambda c: c["data"][1].pop("answers") and None),
            "entry 2: key 'answers' is missing",
        ),
        (
            "text-pure",
            "textvqa/TextVQA_0.5.1_val.json",
            edit_json(lambda c: c["data"][1]["answers"].pop() and None),
            "9 answers, 10 were expected",
        ),
        (
            "text-ocr",
            "textvqa/TextVQA_0.5.1_val.json",
            replace_text('"data"', '"date"'),
            "key 'data' is missing",
        ),
        (
            "text-ocr",
            "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            edit_lines(lambda rows: rows.reverse()),
            "entry 1: the question is 'what is on the label?'",
        ),
        (
            "text-ocr",
            "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            edit_lines(lambda rows: rows.pop()),
            "5 questions, TextVQA_0.5.1_val.json has 6",
        ),
        (
            "pope",
            "pope/coco_pope_popular.json",
            edit_lines(set_in(2, label="maybe")),
            "entry 3: label 'maybe', yes or no was expected",
        ),
        (
            "pope",
            "pope/coco_pope_random.json",
            edit_lines(drop(0, "text")),
            "key 'text' is missing",
        ),
        (
            "tallyQA",
            "tallyqa/test.json",
            edit_json(set_in(3, answer=16)),
            "entry 4: answer 16, 0 to 15 was expected",
        ),
        ("tallyQA", "tallyqa/test.json", edit_json(set_in(0, issimple="no")), "issimple is 'no'"),
        ("tallyQA", "tallyqa/test.json", edit_json(drop(5, "image")), "entry 6: key 'image'"),
        ("tallyQA", "tallyqa/test.json", edit_json(lambda c: {"a": c}), "a list was expected"),
        ("tallyQA", "tallyqa/test.json", edit_json(lambda c: c.clear()), "it holds no entries"),
        ("vsr", "vsr/test.jsonl", edit_lines(set_in(0, label=2)), "label 2, 0 or 1 was expected"),
        ("vsr", "vsr/test.jsonl", edit_lines(drop(1, "caption")), "entry 2: key 'caption'"),
        ("vsr", "vsr/test.jsonl", edit_lines(set_in(1, image="/etc/x")), "'/etc/x' does not lie"),
        (
            "RefCOCO",
            "refcoco/instances.json",
            edit_json(lambda c: c["annotations"][1].pop("bbox") and None),
            "entry 2: key 'bbox' is missing",
        ),
        (
            "RefCOCO",
            "refcoco/instances.json",
            edit_json(lambda c: c["images"][0].pop("width") and None),
            "entry 1: key 'width' is missing",
        ),
        (
            "RefCOCO",
            "refcoco/instances.json",
            replace_text('"width": 64', '"width": 30'),
            "does not lie in an image of 30 x 48",
        ),
        (
            "llava-wild",
            "llava_bench_wild/questions.jsonl",
            edit_lines(set_in(0, category="chat")),
            "category 'chat', one of conv, detail, complex was expected",
        ),
        (
            "llava-wild",
            "llava_bench_wild/answers_gpt4.jsonl",
            edit_lines(lambda rows: rows.pop(2)),
            "entry 3: answers_gpt4.jsonl has no answer to question 2",
        ),
        (
            "llava-wild",
            "llava_bench_wild/answers_gpt4.jsonl",
            edit_lines(drop(2, "text")),
            "the answer to question 2 has no key 'text'",
        ),
        (
            "llava-coco",
            "llava_bench_coco/caps_boxes_coco2014_val_80.jsonl",
            edit_lines(lambda rows: rows.pop(0)),
            "says nothing about image 000000000001.jpg",
        ),
        (
            "llava-coco",
            "llava_bench_coco/caps_boxes_coco2014_val_80.jsonl",
            edit_lines(drop(0, "instances")),
            "entry 1: key 'instances' is missing",
        ),
        ("MMVP", "mmvp/Questions.csv", replace_text("Options", "Choices"), "column 'Options'"),
        ("MMVP", "mmvp/Questions.csv", replace_text("(b) 2,(b)", "(b) 2,(c)"), "'(c)' is none of"),
        ("MMVP", "mmvp/Questions.csv", replace_text('8,"How', '9,"How'), "not numbered 1, 2,"),
        ("MMVP", "mmvp/Questions.csv", replace_text(",(a) 1 (b) 2,(b)", ""), "not as many fields"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(
    column: str, file: str, edit: Callable[[Path], None], problem: str, root: Path
) -> None:
    path = root / file
    before = path.read_bytes()
    edit(path)
    assert path.read_bytes() != before
    with pytest.raises(DataError) as error:
        read(root, column)
    assert problem in error.value.problem
    # The file that is wrong is the one that is named, or the file that lacks something.
    assert path.parent.name in error.value.problem
    assert "docs/evaluation.md" in error.value.remedy


def test_a_split_that_is_not_there_is_refused(root: Path) -> None:
    path = root / "refcoco" / "refs(unc).p"
    references = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps([r | {"split": "train"} for r in references], protocol=2))
    with pytest.raises(DataError, match="it holds nothing of the split 'val'"):
        read(root, "RefCOCO")


def test_a_missing_image_is_named_once(root: Path) -> None:
    for name in ("000000000001", "000000000002"):
        (root / "val2014" / f"COCO_val2014_{name}.jpg").unlink()
    with pytest.raises(DataError) as error:
        require_images(read(root, "vqa-v2"), "vqav2")
    assert error.value.problem == (
        f"data set vqav2: image {root / 'val2014' / 'COCO_val2014_000000000001.jpg'} does not "
        "exist, nor do 1 others of 2."
    )


def test_an_image_name_that_no_file_can_have_is_named() -> None:
    document = Document(image="/" + "a" * 5000, image_id="1", prompt="?", target="yes")
    with pytest.raises(DataError, match=r"image /aaa.* does not exist"):
        require_images([document], "vsr")


def test_a_broken_image_is_named(root: Path) -> None:
    row = document_row(read(root, "AI2D")[0])
    (picture,) = to_visual(row)
    assert (picture.mode, picture.size) == ("RGB", (64, 48))
    path = Path(row["image"])
    whole = path.read_bytes()
    for damage, problem in ((whole[: len(whole) // 2], "cannot be decoded"), (None, "not exist")):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(DataError, match=problem) as error:
            to_visual(row)
        assert str(path) in error.value.problem


def test_half_an_image_is_refused_where_lmms_eval_lets_it_pass(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    row = document_row(read(root, "pope")[0])
    path = Path(row["image"])
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="cannot be decoded: image file is truncated"):
        to_visual(row)


def test_an_image_of_another_size_than_its_boxes_is_refused(root: Path) -> None:
    row = document_row(read(root, "RefCOCO")[0])
    shutil.copy(root / "train2014" / "COCO_train2014_000000000012.jpg", row["image"])
    with pytest.raises(DataError, match="has 48 x 64 pixels, the annotations say 64 x 48"):
        to_visual(row)
