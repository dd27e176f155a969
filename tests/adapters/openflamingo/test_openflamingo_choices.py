"""Images that are remembered, answers that are one token each, and where written ones end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_flamingo import save_tiny_base

from kuea_mllm.adapters.base import ChatRequest, ChoosingRuntime
from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime, build_prompt
from kuea_mllm.errors import UserError

COLOURS = ("red", "blue", "green")
CANDIDATES = ["Yes", "No", "Perhaps"]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> OpenFlamingoRuntime:
    base = save_tiny_base(tmp_path_factory.mktemp("flamingo") / "base")
    loaded = OpenFlamingoAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(loaded, OpenFlamingoRuntime)
    return loaded


def requests() -> list[ChatRequest]:
    images = [Image.new("RGB", (40, 24), colour) for colour in COLOURS]
    shown = [(0,), (0,), (), (1,), (0, 1), (2,), (1,)]
    return [
        ChatRequest(
            f"what is {number}?",
            tuple(images[p] for p in places),
            tuple(COLOURS[p] for p in places),
        )
        for number, places in enumerate(shown)
    ]


def apart() -> list[ChatRequest]:
    return [replace(row, image_keys=()) for row in requests()]


def test_each_image_is_encoded_once(
    runtime: OpenFlamingoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runtime.generate(apart(), max_new_tokens=6)
    assert len(set(expected)) > 2
    encoded: list[int] = []
    encode = runtime.encode_images

    def count(images: Sequence[Image.Image]) -> Any:
        encoded.append(len(images))
        return encode(images)

    monkeypatch.setattr(runtime, "encode_images", count)
    assert runtime.generate(requests(), max_new_tokens=6) == expected
    assert runtime.generate(requests()[::-1], max_new_tokens=6) == expected[::-1]
    assert sum(encoded) == len(COLOURS)


def test_the_likeliest_first_token_is_chosen(runtime: OpenFlamingoRuntime) -> None:
    assert isinstance(runtime, ChoosingRuntime)
    with pytest.raises(UserError, match="candidate 'Yes' is not one token"):
        runtime.choose([], CANDIDATES)
    # The blank that the prompt lacks is part of the token.
    runtime.processor.tokenizer.add_tokens([f" {candidate}" for candidate in CANDIDATES])
    runtime.model.resize_token_embeddings(len(runtime.processor.tokenizer), mean_resizing=False)
    with torch.inference_mode():
        inputs = [
            runtime.prepare([build_prompt(r.prompt, image_count=len(r.images))], [r.images])
            for r in apart()
        ]
        states = torch.cat([runtime.model.read(**one).last[:, -1] for one in inputs])
        # Rows that tell these questions apart.
        runtime.model.lm_head.weight[-3:] = (states - states.mean(dim=0))[[0, 2, 5]]
        logits = torch.cat([runtime.model(**one).logits[:, -1, -3:] for one in inputs])
    expected = [CANDIDATES[place] for place in logits.argmax(dim=1)]
    assert len(set(expected)) > 1
    assert runtime.choose(requests(), CANDIDATES) == expected
    assert runtime.choose(apart(), CANDIDATES) == expected


def test_an_answer_ends_where_another_question_begins(
    runtime: OpenFlamingoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [" red\nQuestion: and this? Short answer: blue", " a Short one, [0.1, 0.2]", "", " b"]
    monkeypatch.setattr(runtime, "complete", lambda *_, **__: written)
    assert runtime.generate(requests()[:4], max_new_tokens=6) == [
        "red",
        "a Short one, [0.1, 0.2]",
        "",
        "b",
    ]


def test_an_answer_takes_no_more_than_half_of_the_context(
    runtime: OpenFlamingoRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    # Of 256 tokens; lmms-eval's LLaVA-Bench allows 4096.
    rows = requests()[:2]
    with caplog.at_level("WARNING", logger="kuea_mllm"):
        longest = runtime.generate(rows, max_new_tokens=4096)
        assert longest == runtime.generate(rows, max_new_tokens=128)
        runtime.generate(rows, max_new_tokens=4096)
    assert [record.getMessage() for record in caplog.records] == [
        "Answers of up to 4096 tokens are allowed: they end after 128, half of the context."
    ]
    assert runtime.describe()["longest_answer"] == 128
    with pytest.raises(UserError, match="4096 new tokens leave no room for a prompt in the 256"):
        runtime.complete(["?"], [[]], max_new_tokens=4096)
