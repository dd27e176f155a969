"""Both schemas become the same records; what nothing can be trained on is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from mixture_samples import record, turns

from kuea_mllm.tuning.records import (
    MalformedRecord,
    leaves_folder,
    normalise,
    signed_length,
    trained_turns,
    untrained_reason,
)


def with_turns(*values: str, first: str = "human", image: str | None = None) -> dict[str, Any]:
    return record(image=image, conversations=turns(*values, first=first))


def chat(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": 7, "messages": [{"role": r, "content": c} for r, c in messages], **more}


def test_record_of_the_mixture_is_kept_as_it_is() -> None:
    raw = record(3, image="coco/3.jpg")
    assert normalise(raw) == raw
    assert normalise(record(image=None)) == {**record(image=None), "image": None}
    assert normalise({**record(image=None), "image": None})["image"] is None


def test_length_counts_words_and_is_negative_without_an_image() -> None:
    assert signed_length(normalise(with_turns("<image>\none two", "three", image="a.jpg"))) == 4
    assert signed_length(normalise(with_turns("one two", " three  four "))) == -4


PARTS = [{"type": "image", "path": "x/1.jpg"}, {"type": "text", "text": "What?"}]
NAMELESS = [{"type": "text", "text": "What?"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("raw", "image", "question"),
    [
        (chat(("user", "What?"), ("assistant", "So.")), None, "What?"),
        (chat(("user", PARTS), ("assistant", "So.")), "x/1.jpg", "<image>\nWhat?"),
        (
            chat(("user", NAMELESS), ("assistant", "So."), images=["x/1.jpg"]),
            "x/1.jpg",
            "What?\n<image>",
        ),
        (
            chat(("user", "<image>What?"), ("assistant", "So."), image="x/1.jpg"),
            "x/1.jpg",
            "<image>What?",
        ),
    ],
)
def test_chat_messages_become_the_same_records(
    raw: dict[str, Any], image: str | None, question: str
) -> None:
    assert normalise(raw) == {
        "id": "7",
        "image": image,
        "conversations": turns(question, "So."),
    }


SYSTEM = chat(("system", "Be kind."), ("user", "What?"), ("assistant", "So."))
TWO_PATHS = chat(("user", [*PARTS, PARTS[0]]), ("assistant", "So."))
SOUND = chat(("user", "What?"), ("assistant", "So."))
VIDEO = chat(("user", [{"type": "video"}]), ("assistant", "So."))
MALFORMED: dict[str, tuple[Any, str, str]] = {
    "list": ([1], "no object", r"it is \[1\]"),
    "nothing": ({"id": "a"}, "no conversation", "neither"),
    "empty": (record(conversations=[]), "no conversation", "not a list"),
    "turn": (record(conversations=["hi"]), "bad turn", 'turn 1 of "conversations"'),
    "value": (record(conversations=[{"from": "human", "value": None}]), "bad turn", "None, no"),
    "speaker": (record(conversations=[{"from": "bot", "value": "x"}]), "unknown speaker", "'bot'"),
    "two questions": (
        record(image=None, conversations=turns("a", "b") + turns("c") + turns("d")),
        "turns do not alternate",
        "turn 4 is from human",
    ),
    "two answers first": (
        record(image=None, conversations=turns("a", first="gpt") + turns("b", "c", first="gpt")),
        "turns do not alternate",
        "turn 2 is from gpt",
    ),
    "answer only": (with_turns("a", first="gpt"), "no question", "an answer only"),
    "no words": (with_turns("", " "), "no words", "empty"),
    "no tag": (with_turns("a", "b", image="a.jpg"), "image tags do not match", "0 of its 2"),
    "tags in two turns": (
        with_turns("<image>a", "b", "<image>c", "d", image="a.jpg"),
        "image tags do not match",
        "2 of its 4",
    ),
    "number as image": (record(image="a.png") | {"image": 5}, "bad image", "5, not a path"),
    "empty image": (record() | {"image": ""}, "bad image", "'', not a path"),
    "remote image": (record() | {"image": "https://x/y.png"}, "bad image", "not a path"),
    "upwards": (record(image="a/../../b.png"), "path leaves the folder", "a/../../b.png"),
    "absolute": (record(image="/etc/b.png"), "path leaves the folder", "/etc/b.png"),
    "system prompt": (SYSTEM, "unknown speaker", "system prompt"),
    "role": (chat(("robot", "x")), "unknown speaker", "'robot'"),
    "part": (VIDEO, "bad turn", "no text and no image"),
    "content": (chat(("user", 5)), "bad turn", "is 5"),
    "two images": (TWO_PATHS, "several images", "2 images"),
    "images": ({**SOUND, "images": "a.png"}, "bad image", "not a list"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_record_is_refused_with_its_fault(case: str) -> None:
    raw, kind, text = MALFORMED[case]
    with pytest.raises(MalformedRecord, match=text) as caught:
        normalise(raw)
    assert caught.value.kind == kind


def test_several_tags_in_one_turn_are_one_image() -> None:
    assert normalise(with_turns("<image> a <image>", "b", image="a.jpg"))["image"] == "a.jpg"


def test_answer_before_the_first_question_is_not_trained() -> None:
    made = normalise(with_turns("Hello", "Who?", "Me.", first="gpt"))
    assert [turn["value"] for turn in made["conversations"]] == ["Hello", "Who?", "Me."]
    assert [turn["value"] for turn in trained_turns(made)] == ["Who?", "Me."]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("a", "b"), None),
        (("a", ""), "turn 2 (gpt) is empty"),
        (("a", "b", "", "d"), "turn 3 (human) is empty"),
        (("a", "b", "c"), "the last question has no answer"),
    ],
)
def test_records_that_teach_nothing_are_told(values: tuple[str, ...], reason: str | None) -> None:
    assert untrained_reason(normalise(with_turns(*values))) == reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", False),
        ("a/../b.jpg", False),
        ("./b.jpg", False),
        ("..", True),
        ("../b.jpg", True),
        ("a/../../b.jpg", True),
        ("/a.jpg", True),
    ],
)
def test_paths_out_of_the_folder_are_told(name: str, expected: bool) -> None:
    assert leaves_folder(name) is expected
