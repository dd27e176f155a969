"""Answers of a column: choices, neighbours, images made ready ahead, kept between sittings."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kuea_mllm.errors import DataError, EvaluationError, UserError
from kuea_mllm.evaluation.answering import processes
from kuea_mllm.evaluation.answering.answers import answer_questions
from kuea_mllm.evaluation.answering.generation import Answerer
from kuea_mllm.evaluation.answering.journal import Journal, holds_answers
from kuea_mllm.evaluation.answering.preparing import Preparer, image_key
from kuea_mllm.evaluation.answering.processes import share_out
from kuea_mllm.evaluation.answering.questions import (
    GenerationSettings,
    PendingQuestion,
    in_order,
    read_generation_kwargs,
)
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER, Session
from kuea_mllm.evaluation.jobs import Job, Jobs
from kuea_mllm.evaluation.lmms.image_hints import image_hints
from kuea_mllm.evaluation.runner import _prepare_session
from kuea_mllm.evaluation.unfinished import Identity, Unfinished


class PlainRuntime:
    """Answers with the prompt, in capitals; "stop" interrupts."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        self.batches.append(list(requests))
        if any(request.prompt == "stop" for request in requests):
            raise KeyboardInterrupt
        if any(request.prompt == "bad" for request in requests):
            raise ValueError("no")
        return [request.prompt.upper() for request in requests]

    def describe(self) -> dict[str, Any]:
        return {}

    def vision_state(self) -> dict[str, Any]:
        return {}

    @property
    def prompts(self) -> list[list[str]]:
        return [[request.prompt for request in batch] for batch in self.batches]


class ChoosingRuntime(PlainRuntime):
    """Always takes the last candidate; knows no "Maybe"."""

    def choose(self, requests: Sequence[Any], candidates: Sequence[str]) -> list[str]:
        if "Maybe" in candidates:
            raise UserError("candidate 'Maybe' is not one token.")
        return [candidates[-1]] * len(requests)


class PreparingRuntime(PlainRuntime):
    """Counts what it is given to preprocess, and in which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, str]] = []

    def preprocess(self, image: Image.Image) -> str:
        self.seen.append((image.getpixel((0, 0)), threading.current_thread().name))
        return f"pixels of {image.getpixel((0, 0))}"


def ask(prompt: str, doc_id: int = 0, colour: str | None = None, **changes: Any) -> PendingQuestion:
    settings = GenerationSettings(**{"max_new_tokens": 5, **changes})

    def load() -> list[Image.Image]:
        return [] if colour is None else [Image.new("RGB", (4, 4), colour)]

    return PendingQuestion("task", doc_id, prompt, load, settings, colour)


def session_of(runtime: Any, folder: Path | None = None, **changes: Any) -> Session:
    journal = None if folder is None else Journal(folder / "task", "content")
    return Session(runtime, "tower", show_progress=False, journal=journal, **changes)


def several(*prompts: str) -> list[PendingQuestion]:
    return [ask(prompt, doc_id=number) for number, prompt in enumerate(prompts)]


def test_candidates_are_read_and_chosen_between() -> None:
    settings, ignored = read_generation_kwargs({"candidates": ["True", "False"]})
    assert settings.candidates == ("True", "False")
    assert ignored == []
    session = session_of(ChoosingRuntime())
    questions = [ask("a", candidates=("Yes", "No")), ask("b")]
    assert answer_questions(session, 4, questions) == ["No", "B"]


def test_candidates_of_later_columns_are_looked_at_before_the_first(tmp_path: Path) -> None:
    runtime = ChoosingRuntime()
    jobs = Jobs(
        {
            "first": Job("first", dict, generation={"candidates": ["Yes", "No"]}),
            "written": Job("written", dict, generation={"max_new_tokens": 5}),
            "last": Job("last", dict, generation={"candidates": ["Yes", "Maybe"]}),
        }
    )
    kept = Unfinished(tmp_path, Identity({}, {}), is_resumed=False)
    with pytest.raises(UserError, match="'Maybe' is not one"):
        _prepare_session(Session(runtime, "f"), jobs, kept, None)
    assert not runtime.batches


@pytest.mark.parametrize(
    ("runtime", "words"),
    [(PlainRuntime(), "chooses between Yes, Maybe"), (ChoosingRuntime(), "'Maybe' is not one")],
)
def test_impossible_choices_are_refused_before_any_question(runtime: Any, words: str) -> None:
    questions = [ask("a"), ask("b", candidates=("Yes", "Maybe"))]
    with pytest.raises(UserError, match=words):
        answer_questions(session_of(runtime), 4, questions)
    assert runtime.batches == []


def test_questions_about_one_image_are_neighbours() -> None:
    asked = [("aa", "red"), ("a", "blue"), ("a", "red"), ("aaaa", "blue"), ("aaa", None)]
    questions = [ask(prompt, colour=colour) for prompt, colour in asked]
    assert in_order(questions, by_image=True) == [[3, 1, 4, 0, 2]]
    assert in_order(questions, by_image=False) == [[3, 4, 0, 1, 2]]


def test_equal_pixels_have_one_name_and_other_pixels_another() -> None:
    red = Image.new("RGB", (4, 2), "red")
    assert image_key(red) == image_key(red.copy())
    others = [red.resize((2, 4)), red.convert("L"), Image.new("RGB", (4, 2), (255, 0, 1))]
    assert len({image_key(image) for image in [red, *others]}) == 4


def test_images_are_named_by_their_pixels_whatever_the_task_calls_them() -> None:
    runtime = PlainRuntime()
    red, blue, again = ask("a", 0, "red"), ask("bb", 1, "blue"), ask("ccc", 2, "red")
    mislabelled = PendingQuestion("task", 3, "dddd", blue.load_images, blue.settings, "red")
    answer_questions(session_of(runtime), 8, [red, blue, again, mislabelled])
    names = {request.prompt: request.image_keys for request in runtime.batches[0]}
    assert names["a"] == names["ccc"] != names["bb"] == names["dddd"]
    answer_questions(session_of(runtime, shared_prefix=False), 8, [red, again])
    assert [request.image_keys for request in runtime.batches[1]] == [(), ()]


@pytest.mark.parametrize("shared", [True, False])
def test_images_are_preprocessed_by_threads_once_each(shared: bool) -> None:
    runtime = PreparingRuntime()
    questions = [ask(f"{number}", number, "red" if number < 5 else "blue") for number in range(6)]
    answer_questions(session_of(runtime, shared_prefix=shared), 2, questions)
    assert len(runtime.seen) == (2 if shared else 6)
    assert all(thread.startswith("images") for _, thread in runtime.seen)
    pixels = {r.prompt: r.pixels for batch in runtime.batches for r in batch}
    assert pixels["0"] == ("pixels of (255, 0, 0)",)
    assert pixels["5"] == ("pixels of (0, 0, 255)",)


def test_no_more_than_some_batches_are_loaded_ahead() -> None:
    loaded: list[int] = []
    questions = [
        PendingQuestion("task", n, "a", lambda n=n: loaded.append(n) or [], GenerationSettings())
        for n in range(40)
    ]
    with Preparer(
        questions, range(40), PlainRuntime(), batch_size=4, names_images=True
    ) as preparer:
        preparer.take(range(4))
        preparer.take(range(4, 8))
    assert set(range(8)) <= set(loaded) <= set(range(8 + 8))


def test_interrupted_answers_are_kept_and_not_asked_again(tmp_path: Path) -> None:
    questions = several("aaaaa", "bad", "ccccc", "stop", "a")
    first = session_of(PlainRuntime(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(first, 1, questions)
    assert holds_answers(tmp_path)
    runtime = PlainRuntime()
    questions = several("aaaaa", "bad", "ccccc", "st", "a")
    answers = answer_questions(session_of(runtime, tmp_path), 1, questions)
    assert answers == ["AAAAA", FAILED_ANSWER, "CCCCC", "ST", "A"]
    # What failed is tried again.
    assert runtime.prompts == [["bad"], ["st"], ["a"]]
    runtime = PlainRuntime()
    changed = [ask("aaaaa", max_new_tokens=6), ask("AAAAA"), ask("aaaaa", doc_id=1), ask("aaaaa")]
    assert answer_questions(session_of(runtime, tmp_path), 8, changed) == ["AAAAA"] * 4
    assert [len(batch) for batch in runtime.prompts] == [1, 2]


def test_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    questions = several("a", "b", "c")
    answer_questions(session_of(PlainRuntime(), tmp_path), 1, questions)
    path = tmp_path / "task" / "0.jsonl"
    assert len(path.read_text().splitlines()) == 4
    path.write_bytes(path.read_bytes()[:-7])
    runtime = PlainRuntime()
    assert answer_questions(session_of(runtime, tmp_path), 1, questions) == ["A", "B", "C"]
    assert runtime.prompts == [["c"]]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["answer"] for line in lines[1:]] == ["A", "B", "C"]


def test_answers_of_other_processes_are_known(tmp_path: Path) -> None:
    questions = several("a", "b", "c")
    journal = Journal(tmp_path / "task", "content")
    journal.write([(questions[0], "first")], process=0)
    journal.write([(questions[2], "third")], process=1)
    assert journal.known_answers(questions) == {0: "first", 2: "third"}


def test_question_that_is_repeated_has_an_answer_for_each_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path, None)
    journal.write([(ask("a"), "first"), (ask("a"), "second")], process=0)
    assert journal.known_answers([ask("a"), ask("a"), ask("a")]) == {0: "first", 1: "second"}


def test_answers_to_other_data_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "old").write([(ask("a"), "A")], process=0)
    with pytest.raises(EvaluationError, match="files of the data set have changed"):
        Journal(tmp_path, "new").known_answers([ask("a")])


def test_damaged_answers_are_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, None)
    journal.write([(ask("a"), "A")], process=3)
    path = tmp_path / "3.jsonl"
    path.write_text(path.read_text() + "{half\n")
    with pytest.raises(DataError, match=r"3\.jsonl are damaged"):
        journal.known_answers([ask("a")])


def test_pictures_of_known_answers_are_shown_too(tmp_path: Path) -> None:
    questions = [ask("a", 0, "red"), ask("b", 1, "blue"), ask("c", 2, "green")]
    shown: list[int] = []
    for _ in range(2):
        shown.clear()
        session = session_of(PlainRuntime(), tmp_path, shown=2)
        session.on_images = lambda task, doc_id, images: shown.append(doc_id)
        answer_questions(session, 1, questions)
    assert shown == [0, 1]


def test_picture_that_cannot_be_read_any_more_is_passed_over_and_a_full_disk_is_not(
    tmp_path: Path,
) -> None:
    def lost() -> list[Any]:
        raise OSError("the file is gone")

    questions = [ask("a", 0, "red"), ask("b", 1, "blue")]
    answer_questions(session_of(PlainRuntime(), tmp_path), 1, questions)
    shown: list[int] = []
    session = session_of(PlainRuntime(), tmp_path, shown=2)
    session.on_images = lambda task, doc_id, images: shown.append(doc_id)
    answer_questions(session, 1, [replace(questions[0], load_images=lost), questions[1]])
    assert shown == [1]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    session.on_images = full
    with pytest.raises(OSError, match="No space left"):
        answer_questions(session, 1, questions)


def test_work_is_shared_out_by_image_and_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "process_count", lambda: 3)
    colours = ["red"] * 5 + ["blue"] * 4 + ["green"] * 3 + [None] * 3
    questions = [ask("a", number, colour) for number, colour in enumerate(colours)]
    shares = share_out(questions, [place for place in range(15) if place != 2])
    assert sorted(place for share in shares for place in share) == [0, 1, *range(3, 15)]
    assert sorted(map(len, shares)) == [4, 5, 5]
    for colour in ("red", "blue", "green"):
        owners = {n for n, share in enumerate(shares) for p in share if colours[p] == colour}
        assert len(owners) == 1


class Column:
    dtype: str

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class Documents:
    """As a data set of `datasets`: columns by name, images decoded when one is touched."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)
        kinds = {str: "string", int: "int64", Image.Image: "image"}
        self.features = {name: Column(kinds[type(v[0])]) for name, v in columns.items()}

    def __getitem__(self, name: str) -> list[Any]:
        assert self.features[name].dtype != "image", "an image would be decoded"
        return self.columns[name]


def test_hints_come_from_columns_without_decoding() -> None:
    picture = Image.new("RGB", (1, 1))
    documents = Documents(image=[picture] * 3, image_id=[5, 5, 6], question=["a", "b", "c"])
    assert image_hints(documents) == ["5", "5", "6"]
    ours = Documents(image_id=["x", "y", "x"], image=["/a.png", "/a.png", "/b.png"])
    assert image_hints(ours) == ["/a.png", "/a.png", "/b.png"]
    # A property of the data set, and pairs of images, say nothing about one image.
    assert image_hints(Documents(image_source=["coco"] * 3, pair_index=[0, 0, 1])) is None
    assert image_hints([{"image_id": 1}]) is None


def test_batch_size_changes_no_answer() -> None:
    questions = [ask("abcdefgh"[: 1 + n % 8], n, ["red", "blue", None][n % 3]) for n in range(20)]
    runs = [Answerer(session_of(PlainRuntime()), size).answer(questions) for size in (1, 4, 16)]
    assert runs[0] == runs[1] == runs[2] == [question.prompt.upper() for question in questions]
