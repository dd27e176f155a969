"""Greedy generation against the original LLaVA model (runs E and F, see llava/index.json)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.prompt import SYSTEM
from kuea_mllm.adapters.llava.runtime import LlavaRuntime

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
FORWARD = load_file(GOLDEN / "model" / "forward.safetensors")
RUNS: dict[str, Any] = json.loads((GOLDEN / "model" / "forward.json").read_text())
PLACEHOLDER = Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original weights under today's names, vocabulary padded, as a complete directory."""
    out = tmp_path_factory.mktemp("golden_llava")
    model = GOLDEN / "model"
    config = json.loads((model / "config_transformers_5_23.json").read_text())
    vocabulary = config["text_config"]["vocab_size"]
    mapping = json.loads((model / "key_mapping_to_transformers_5_23.json").read_text())
    state = {mapping[key]: value for key, value in load_file(model / "weights.safetensors").items()}
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        padding = torch.zeros(vocabulary - state[name].shape[0], state[name].shape[1])
        state[name] = torch.cat([state[name], padding])
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    shutil.copy(model / "preprocessor_config.json", out)
    shutil.copytree(GOLDEN / RUNS["token_ids_from"], out, dirs_exist_ok=True)
    return out


@pytest.fixture(scope="module")
def runtime(model_dir: Path) -> LlavaRuntime:
    loaded = LlavaAdapter().open_runtime(model_dir, dtype="float32", device="cpu")
    assert isinstance(loaded, LlavaRuntime)
    return loaded


def question_of(run: str) -> str:
    text: str = RUNS[run]["prompt"]
    return text.removeprefix(f"{SYSTEM} USER: ").removesuffix(" ASSISTANT:").strip()


def request_of(run: str) -> ChatRequest:
    has_image = f"{run}.pixel_values" in FORWARD
    return ChatRequest(question_of(run), (PLACEHOLDER,) if has_image else ())


def use_golden_pixels(
    runtime: LlavaRuntime, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    # The set gives the pixel values of its runs, not the picture they came from.
    pixels = [FORWARD[key] for run in runs if (key := f"{run}.pixel_values") in FORWARD]
    monkeypatch.setattr(runtime, "_images", lambda _: torch.cat(pixels))


def expanded(ids: list[int], image_id: int, count: int) -> list[int]:
    return [new for old in ids for new in ([image_id] * count if old == -200 else [old])]


@pytest.mark.parametrize("run", ["E", "F"])
def test_greedy_tokens_equal_the_original(
    run: str, runtime: LlavaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_golden_pixels(runtime, monkeypatch, [run])
    config = runtime.model.config
    inputs = runtime.prepare([request_of(run)])
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    original = FORWARD[f"{run}.input_ids"][0].tolist()
    assert inputs["input_ids"][0].tolist() == expanded(original, config.image_token_id, patches)

    new_ids = FORWARD[f"{run}.generated_new_ids"][0].tolist()
    answer = runtime.generate_ids([request_of(run)], max_new_tokens=len(new_ids))[0]
    end = runtime.tokenizer.eos_token_id
    assert answer == (new_ids[: new_ids.index(end)] if end in new_ids else new_ids)


def test_step_scores_equal_the_original(
    runtime: LlavaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_golden_pixels(runtime, monkeypatch, ["E"])
    inputs = runtime.prepare([request_of("E")])
    scores, new_ids = FORWARD["E.step_scores"], FORWARD["E.generated_new_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_ids[:, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = runtime.model(**inputs).logits[0, -len(scores) :, : scores.shape[1]]
    assert (logits - scores).abs().max().item() <= 1e-4


def test_batching_does_not_change_the_answers(
    runtime: LlavaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_golden_pixels(runtime, monkeypatch, ["E", "F", "E"])
    runs = ["E", "F", "E"]
    length = min(FORWARD[f"{run}.generated_new_ids"].shape[1] for run in runs)
    answers = runtime.generate_ids([request_of(run) for run in runs], max_new_tokens=length)
    end = runtime.tokenizer.eos_token_id
    for run, answer in zip(runs, answers, strict=True):
        new_ids = FORWARD[f"{run}.generated_new_ids"][0, :length].tolist()
        assert answer == (new_ids[: new_ids.index(end)] if end in new_ids else new_ids), run
