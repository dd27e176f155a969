from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.evaluation.answering import generation
from kuea_mllm.evaluation.answering.generation import Answerer
from kuea_mllm.evaluation.answering.preparing import strict_image_files
from kuea_mllm.evaluation.answering.questions import (
    DEFAULT_NEW_TOKENS,
    GenerationSettings,
    PendingQuestion,
    cut_at_stop,
    read_generation_kwargs,
)
from kuea_mllm.evaluation.answering.session import (
    FAILED_ANSWER,
    Session,
    argument_to_path,
    offer_session,
    path_to_argument,
    take_session,
)


class FakeRuntime:
    """Answers with the prompt itself; prompts with "bad" in them break the batch."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.memory_error: Exception = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        self.batches: list[list[str]] = []
        self.options: list[dict[str, Any]] = []

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        prompts = [request.prompt for request in requests]
        self.batches.append(prompts)
        self.options.append(options)
        if len(requests) > self.most:
            raise self.memory_error
        if any("bad" in prompt for prompt in prompts):
            raise ValueError("cannot\nanswer")
        return [f"answer to {prompt}" for prompt in prompts]

    def describe(self) -> dict[str, Any]:
        return {}

    def vision_state(self) -> Mapping[str, Any]:
        return {}


def ask(prompt: str, doc_id: int = 0, **settings: Any) -> PendingQuestion:
    return PendingQuestion(
        "task", doc_id, prompt, lambda: [Image.new("RGB", (4, 4))], GenerationSettings(**settings)
    )


def session_with(runtime: FakeRuntime) -> Session:
    return Session(runtime=runtime, fingerprint="tower", show_progress=False)


def test_answers_come_back_in_the_order_received() -> None:
    runtime = FakeRuntime()
    prompts = ["aa", "bbbb", "c", "ddd", "eeeee"]
    answers = Answerer(session_with(runtime), 2).answer([ask(prompt) for prompt in prompts])
    assert answers == [f"answer to {prompt}" for prompt in prompts]
    assert list(itertools.chain(*runtime.batches)) == sorted(prompts, key=len, reverse=True)
    assert [len(batch) for batch in runtime.batches] == [2, 2, 1]


def test_questions_with_other_settings_are_batched_apart() -> None:
    runtime = FakeRuntime()
    questions = [ask("a", max_new_tokens=5), ask("b", max_new_tokens=9), ask("c", max_new_tokens=5)]
    answers = Answerer(session_with(runtime), 8).answer(questions)
    assert answers == ["answer to a", "answer to b", "answer to c"]
    assert runtime.batches == [["a", "c"], ["b"]]
    assert [options["max_new_tokens"] for options in runtime.options] == [5, 9]


def test_answer_is_cut_at_the_first_stop() -> None:
    assert cut_at_stop("yes\n\nno. stop", ["stop", "\n\n"]) == "yes"
    assert cut_at_stop("yes", ["\n"]) == "yes"
    [answer] = Answerer(session_with(FakeRuntime()), 1).answer([ask("it", until=(" to",))])
    assert answer == "answer"


def test_failed_batch_is_retried_and_only_the_culprit_is_marked() -> None:
    session = session_with(FakeRuntime())
    prompts = ["one", "bad", "three", "four"]
    answers = Answerer(session, 4).answer([ask(p, doc_id=i) for i, p in enumerate(prompts)])
    assert answers == ["answer to one", FAILED_ANSWER, "answer to three", "answer to four"]
    [failure] = session.failures
    assert (failure.task, failure.doc_id, failure.error) == ("task", 1, "ValueError: cannot answer")


def test_unreadable_image_is_a_failure_of_its_question_alone() -> None:
    def broken() -> Sequence[Any]:
        raise OSError("image file is truncated")

    session = session_with(FakeRuntime())
    lost = PendingQuestion("task", 7, "lost", broken, GenerationSettings())
    video = PendingQuestion("task", 8, "video", lambda: ["clip.mp4"], GenerationSettings())
    answers = Answerer(session, 4).answer([ask("a"), lost, video])
    assert answers == ["answer to a", FAILED_ANSWER, FAILED_ANSWER]
    errors = {failure.doc_id: failure.error for failure in session.failures}
    assert set(errors) == {7, 8}
    assert "only images" in errors[8]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("MPS backend out of memory"),
        EnvironmentFailure("out of memory on cuda:0 while answering 8 questions at once."),
    ],
)
def test_out_of_memory_halves_the_batch_for_the_rest(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime(most=2)
    runtime.memory_error = error
    session = session_with(runtime)
    answers = Answerer(session, 8).answer([ask(str(i)) for i in range(12)])
    assert answers == [f"answer to {i}" for i in range(12)]
    assert not session.failures
    assert [len(batch) for batch in runtime.batches] == [8, 4, 2, 2, 2, 2, 2, 2]
    assert [record.message for record in caplog.records] == [
        "Out of memory at a batch of 8: going on with 4.",
        "Out of memory at a batch of 4: going on with 2.",
    ]


def test_out_of_memory_with_one_question_is_a_failure() -> None:
    session = session_with(FakeRuntime(most=0))
    assert Answerer(session, 2).answer([ask("a"), ask("b")]) == [FAILED_ANSWER] * 2
    assert len(session.failures) == 2


def test_model_that_answers_nothing_at_all_is_stopped_early() -> None:
    runtime = FakeRuntime()
    questions = [ask("bad", doc_id=i) for i in range(1000)]
    with pytest.raises(EnvironmentFailure, match="first 16 questions all failed"):
        Answerer(session_with(runtime), 1).answer(questions)
    assert len(runtime.batches) == generation.HOPELESS


def test_wrong_number_of_answers_is_noticed() -> None:
    class Short(FakeRuntime):
        def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
            return super().generate(requests, **options)[: 1 if len(requests) == 1 else -1]

    session = session_with(Short())
    assert Answerer(session, 2).answer([ask("a"), ask("b")]) == ["answer to a", "answer to b"]


def test_images_are_shown_to_the_observer_in_rgb() -> None:
    seen: list[tuple[str, int, str]] = []
    session = session_with(FakeRuntime())
    session.on_images = lambda task, doc_id, images: seen.append((task, doc_id, images[0].mode))
    question = PendingQuestion(
        "task", 3, "a", lambda: [Image.new("L", (2, 2))], GenerationSettings()
    )
    Answerer(session, 1).answer([question])
    assert seen == [("task", 3, "RGB")]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, GenerationSettings(max_new_tokens=DEFAULT_NEW_TOKENS)),
        (
            {"max_new_tokens": 16, "until": "\n", "temperature": 0, "top_p": 1.0},
            GenerationSettings(max_new_tokens=16, until=("\n",)),
        ),
        ({"do_sample": False, "temperature": 0.7}, GenerationSettings()),
        ({"do_sample": True}, GenerationSettings(temperature=1.0)),
        (
            {"temperature": 0.2, "top_p": 0.9, "until": ["", "\n\n"]},
            GenerationSettings(temperature=0.2, top_p=0.9, until=("\n\n",)),
        ),
        ({"num_beams": 3, "until": None}, GenerationSettings(num_beams=3)),
    ],
)
def test_generation_kwargs_are_translated(
    kwargs: dict[str, Any], expected: GenerationSettings
) -> None:
    assert read_generation_kwargs(kwargs) == (expected, [])


def test_unknown_generation_kwargs_are_reported() -> None:
    assert read_generation_kwargs({"image_aspect_ratio": "pad"})[1] == ["image_aspect_ratio"]


def test_truncated_images_are_refused_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with strict_image_files():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_session_is_handed_over_once() -> None:
    session = session_with(FakeRuntime())
    offer_session("model", session)
    assert take_session("model") is session
    assert take_session("model") is None


@pytest.mark.parametrize("name", ["plain-1.5_7b", "a,b=c", "tower{x}'y\"", "50%", "peft=x", "m n"])
def test_paths_survive_the_argument_string(tmp_path: Path, name: str) -> None:
    argument = path_to_argument(tmp_path / name)
    assert not set(argument) & set(",='\"{}[]")
    assert argument_to_path(argument) == tmp_path / name
    (tmp_path / name).mkdir()
    assert argument_to_path(argument) == tmp_path / name
    assert argument_to_path(str(tmp_path / name)) == tmp_path / name
