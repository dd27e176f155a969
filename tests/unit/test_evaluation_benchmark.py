"""The speed of an evaluation is measured on ways that give the same answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kuea_mllm.adapters.llava.images import PaddedImages
from kuea_mllm.adapters.llava.runtime import LlavaRuntime
from kuea_mllm.miniworld.vocabularies import build_llava_tokenizer
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"
pytestmark = pytest.mark.skipif(not BENCHMARK.exists(), reason="no benchmarks beside the tests")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_ways_of_the_benchmark_give_the_same_answers(benchmark: ModuleType) -> None:
    tokenizer = build_llava_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = benchmark.build_config("tiny", len(tokenizer), image_token)
    device = torch.device("cpu")
    model = benchmark.build_model(
        config, tokenizer.eos_token_id, dtype=torch.float32, device=device
    )
    runtime = LlavaRuntime(model, tokenizer, PaddedImages(336, CLIP_MEAN, CLIP_STD), "random")
    work = benchmark.make_work(1, 3)
    apart = benchmark.ask_ours(runtime, work, 3, batch=1, shared=False)
    assert benchmark.ask_ours(runtime, work, 3, batch=4, shared=True) == apart
    assert runtime.prefixes.reused == 2
    assert all(apart)


def test_true_size_is_that_of_the_model(benchmark: ModuleType) -> None:
    from transformers import LlavaForConditionalGeneration

    config = benchmark.build_config("7b", 700, 699)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.parameters()) == 7_063_427_072
