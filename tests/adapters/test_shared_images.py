"""Questions about one image share its computation, and no answer changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_hf_vlm_runtime import write_gemma3, write_llava_next
from tiny_llava_files import write_tiny_llava
from transformers import AddedToken

from kuea_mllm.adapters.base import ChatRequest, ChoosingRuntime, PreprocessingRuntime
from kuea_mllm.adapters.hf_vlm import sharing
from kuea_mllm.adapters.hf_vlm.adapter import HFVLMAdapter
from kuea_mllm.adapters.hf_vlm.runtime import HFVLMRuntime
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.errors import EnvironmentFailure, UserError

# One image, none, two of them; groups that batches of 3 and 4 cut in two.
SHOWN = [(0,), (0,), (0,), (), (0, 1), (0, 1), (2,), (1,), (), (1,)]
CANDIDATES = ["Yes", "No", "Perhaps"]


def requests() -> list[ChatRequest]:
    noise = torch.randint(0, 256, (3, 20, 31, 3), generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(picture.to(torch.uint8).numpy()) for picture in noise]
    return [
        ChatRequest(
            "word " * (number % 4) + f"what is {number}?",
            tuple(images[place] for place in shown),
            tuple(f"picture {place}" for place in shown),
        )
        for number, shown in enumerate(SHOWN)
    ]


def apart(rows: Sequence[ChatRequest]) -> list[ChatRequest]:
    return [replace(row, image_keys=()) for row in rows]


def in_batches(runtime: Any, rows: Sequence[ChatRequest], size: int, **options: Any) -> list[Any]:
    found = []
    for start in range(0, len(rows), size):
        found += runtime.generate_ids(rows[start : start + size], max_new_tokens=8, **options)
    return found


def open_llava(base: Path) -> LlavaRuntime:
    runtime = LlavaAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(runtime, LlavaRuntime)
    return runtime


def open_other(base: Path) -> HFVLMRuntime:
    runtime = HFVLMAdapter().open_runtime(base, dtype="float32", device="cpu")
    assert isinstance(runtime, HFVLMRuntime)
    return runtime


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> LlavaRuntime:
    base = tmp_path_factory.mktemp("shared") / "llava"
    write_tiny_llava(base)
    runtime = open_llava(base)
    runtime.tokenizer.add_tokens(CANDIDATES)
    return runtime


@pytest.fixture(scope="module")
def next_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next(tmp_path_factory.mktemp("shared") / "llava_next")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_llava_answers_do_not_depend_on_sharing(llava: LlavaRuntime, num_beams: int) -> None:
    expected = in_batches(llava, apart(requests()), 10, num_beams=num_beams)
    assert len({tuple(row) for row in expected}) > 5
    for size in (1, 3, 4, 10):
        assert in_batches(llava, requests(), size, num_beams=num_beams) == expected, size


def test_llava_reads_each_image_once_per_batch(
    llava: LlavaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    forward = llava.model.model.vision_tower.forward

    def count(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        read.append(len(pixel_values))
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(llava.model.model.vision_tower, "forward", count)
    llava.prefixes.forget()
    in_batches(llava, requests(), 10)
    # Images 0, 1 and 2 alone, and 0 with 1: in one pass.
    assert read == [5]
    read.clear()
    in_batches(llava, requests()[:3], 3)
    # The last batch had it.
    assert read == []
    in_batches(llava, requests()[6:8], 1)
    in_batches(llava, requests()[:1], 1)
    assert read == [1, 1, 1]


def test_llava_samples_the_same_with_and_without_sharing(llava: LlavaRuntime) -> None:
    found = []
    for rows in (apart(requests()), requests()):
        torch.manual_seed(3)
        found.append(in_batches(llava, rows, 10, temperature=2.0, top_p=0.9))
    assert found[0] == found[1]


def test_llava_logits_agree_to_rounding(llava: LlavaRuntime) -> None:
    def first_logits(rows: list[ChatRequest]) -> torch.Tensor:
        captured: list[torch.Tensor] = []
        hook = llava.model.lm_head.register_forward_hook(
            lambda module, args, output: captured.append(output[:, -1].clone())
        )
        llava.generate_ids(rows, max_new_tokens=1)
        hook.remove()
        return captured[-1]

    difference = first_logits(requests()) - first_logits(apart(requests()))
    assert difference.abs().max() < 1e-4


def chosen_by_hand(runtime: LlavaRuntime, candidates: list[str]) -> list[str]:
    tokens = [runtime.tokenizer.convert_tokens_to_ids(candidate) for candidate in candidates]
    answers = []
    for row in requests():
        with torch.inference_mode():
            logits = runtime.model(**runtime.prepare([row])).logits[0, -1]
        probabilities = logits[tokens].softmax(dim=0)
        answers.append(candidates[int(probabilities.argmax())])
    return answers


def test_llava_chooses_the_likeliest_first_token(llava: LlavaRuntime) -> None:
    assert isinstance(llava, ChoosingRuntime)
    expected = chosen_by_hand(llava, CANDIDATES)
    assert len(set(expected)) > 1
    assert llava.choose(requests(), CANDIDATES) == expected
    assert llava.choose(apart(requests()), CANDIDATES) == expected
    assert [llava.choose([row], CANDIDATES)[0] for row in requests()] == expected


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        (["Yes", "Certainly"], "candidate 'Certainly' is not one token"),
        (["Yes", "No", "Yes"], "candidates 'Yes' and 'Yes' are the same token"),
        ([], "no candidates"),
    ],
)
def test_candidates_that_are_no_tokens_are_named(
    llava: LlavaRuntime, candidates: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        llava.choose([], candidates)


def test_preprocessed_images_are_taken_as_they_are(llava: LlavaRuntime) -> None:
    assert isinstance(llava, PreprocessingRuntime)
    ready = [
        replace(row, pixels=tuple(llava.preprocess(image) for image in row.images))
        for row in requests()
    ]
    expected = in_batches(llava, requests(), 4)
    assert in_batches(llava, ready, 4) == expected
    other = [replace(row, pixels=tuple(2 - pixels for pixels in row.pixels)) for row in ready]
    assert in_batches(llava, apart(other), 4) != expected


def test_memory_error_lets_go_of_what_is_kept(
    llava: LlavaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava.prefixes.forget()
    in_batches(llava, requests()[:3], 3)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(llava.model, "generate", fail)
        with pytest.raises(EnvironmentFailure, match=r"out of memory on cpu .* 3 questions"):
            in_batches(llava, requests()[:3], 3)
    before = llava.prefixes.computed
    in_batches(llava, requests()[:3], 3)
    assert llava.prefixes.computed == before + 1


def test_other_plain_models_share_after_a_proof(next_base: Path) -> None:
    runtime = open_other(next_base)
    expected = in_batches(runtime, apart(requests()), 10)
    assert runtime.sharing.prefixes.reused == 0
    for size in (1, 4, 10):
        assert in_batches(runtime, requests(), size) == expected, size
        assert in_batches(runtime, requests(), size, num_beams=2) == in_batches(
            runtime, apart(requests()), size, num_beams=2
        )
    assert runtime.sharing.prefixes.reused > 10
    # Its template writes a blank before an answer, which belongs to the token.
    runtime.tokenizer.add_tokens([AddedToken(word, lstrip=True) for word in CANDIDATES])
    assert runtime.choose(requests(), CANDIDATES) == runtime.choose(apart(requests()), CANDIDATES)


def test_models_with_other_attention_go_the_plain_way_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kuea_mllm"), "propagate", True)
    runtime = open_other(write_gemma3(tmp_path / "gemma3"))
    with caplog.at_level(logging.INFO, "kuea_mllm"):
        found = in_batches(runtime, requests(), 4)
    assert found == in_batches(runtime, apart(requests()), 4)
    assert runtime.sharing.prefixes.computed == 0
    assert caplog.text.count("do not share its computation") == 1


def test_model_that_fails_the_proof_goes_the_plain_way(
    next_base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kuea_mllm"), "propagate", True)
    runtime = open_other(next_base)
    right = sharing.next_inputs

    def one_position_late(inputs: dict[str, Any]) -> dict[str, Any]:
        changed = right(inputs)
        return changed | {"position_ids": changed["position_ids"] + 3}

    monkeypatch.setattr(sharing, "next_inputs", one_position_late)
    with caplog.at_level(logging.INFO, "kuea_mllm"):
        found = in_batches(runtime, requests(), 4)
    assert "its logits would change" in caplog.text
    assert found == in_batches(runtime, apart(requests()), 4)
