"""A frozen language model in four or eight bits: what is quantised, what trains, what is merged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
from tuning_world import make_world, recipe_of

from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.errors import RecipeError
from kuea_mllm.tuning.assemble import load_tuning_model
from kuea_mllm.tuning.inputs import TuningInputs, open_tuning_inputs
from kuea_mllm.tuning.loss import supervised_positions
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.receipt import make_receipt
from kuea_mllm.tuning.run import run_tuning

STORED = {"nf4": torch.uint8, "int8": torch.int8}
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quantised")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(world: Path) -> Path:
    """A run on an NF4 base, merged into the base on disk."""
    recipe = recipe_of(
        world,
        model__quantization="nf4",
        optim__micro_batch_size=8,
        optim__epochs=None,
        optim__steps=STEPS,
        optim__lr=1e-2,
        runtime__log_every=1,
    )
    run_tuning(recipe, world / "nf4", merge=True, progress=False)
    return world / "nf4"


def open_model(world: Path, kind: str) -> tuple[TuningInputs, TuningModel]:
    inputs = open_tuning_inputs(recipe_of(world, model__quantization=kind))
    return inputs, load_tuning_model(inputs)


def sample_of(inputs: TuningInputs) -> dict[str, Any]:
    batch = inputs.collator([inputs.examples[0], inputs.examples[5]])
    batch["predicting"], batch["targets"] = supervised_positions(batch.pop("labels"))
    return {k: v for k, v in batch.items() if k not in ("positions", "left_out", "unlabelled")}


def hidden_of(inputs: TuningInputs, model: torch.nn.Module) -> torch.Tensor:
    batch = sample_of(inputs)
    with torch.no_grad():
        # In training mode, there being no dropout: bitsandbytes packs weights anew to generate on a
        # CPU, which this model is too small for.
        return inputs.tuner.hidden_states(model.train(), batch)[batch["attention_mask"].bool()]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_language_models_linear_layers_are_quantised_and_nothing_else(
    world: Path, kind: str
) -> None:
    inputs, model = open_model(world, kind)
    targets = linear_targets(inputs.tuner.build_empty(inputs.base), inputs.parts, None)
    found = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.inner.named_parameters()
        if not parameter.is_floating_point()
    }
    assert set(found) == {f"{path}.weight" for path in targets}
    assert {p.dtype for p in found.values()} == {STORED[kind]}
    others = [p for p in model.parameters() if p.is_floating_point()]
    assert {p.dtype for p in others} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_receipt_counts_what_quantised_weights_stand_for(world: Path, kind: str) -> None:
    inputs, model = open_model(world, kind)
    plain_inputs, plain = open_model(world, "none")
    receipts = [
        make_receipt(m.inner, i.parts, head_trains=False)
        for i, m in ((inputs, model), (plain_inputs, plain))
    ]
    counts = [{(g.name, g.parameters) for g in receipt.groups} for receipt in receipts]
    assert counts[0] == counts[1]
    # Two numbers in a byte: what lies in memory says something else.
    stored = sum(p.numel() for n, p in model.inner.named_parameters() if "base_layer" in n)
    full = sum(p.numel() for n, p in plain.inner.named_parameters() if "base_layer" in n)
    assert stored == (full // 2 if kind == "nf4" else full)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_trains_through_quantised_weights(world: Path, kind: str) -> None:
    inputs, model = open_model(world, kind)
    batch = sample_of(inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model.train()(**batch) / len(batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_trainer_runs_on_nf4_and_learns(tuned: Path) -> None:
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    assert sum(r["loss"] for r in rows[-5:]) < 0.8 * sum(r["loss"] for r in rows[:5])
    record = json.loads((tuned / "adapter" / "kuea.json").read_text())
    assert record["quantization"] == "nf4"


def test_merging_goes_into_the_weights_on_disk(world: Path, tuned: Path) -> None:
    disk, merged = (
        load_file(folder / "model.safetensors") for folder in (world / "model", tuned / "merged")
    )
    lora = load_file(tuned / "adapter" / "adapter_model.safetensors")
    pairs = [name for name in lora if name.endswith("lora_A.weight")]
    assert len(pairs) == 14
    for name in pairs:
        a, b = lora[name], lora[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        key = next(k for k in disk if k.endswith(f"{path.partition('language_model.')[2]}.weight"))
        scale = 8 / 4  # alpha / rank
        torch.testing.assert_close(merged[key], disk[key] + scale * (b @ a), rtol=0, atol=1e-6)
        assert not torch.equal(merged[key], disk[key])


def test_merged_model_differs_from_the_tuned_one_by_the_quantisation_alone(
    world: Path, tuned: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from peft import set_peft_model_state_dict

    lora = load_file(tuned / "adapter" / "adapter_model.safetensors")
    inputs, quantised = open_model(world, "nf4")
    _, plain = open_model(world, "none")
    untuned = distance(hidden_of(inputs, quantised.inner), hidden_of(inputs, plain.inner))
    for model in (quantised, plain):
        set_peft_model_state_dict(model.wrapped, lora)
    merged_inputs = open_tuning_inputs(recipe_of(world, model__path=str(tuned / "merged")))
    merged = merged_inputs.tuner.load_for_tuning(
        merged_inputs.base, dtype="float32", device="cpu", quantization=None
    )
    answer = hidden_of(inputs, merged)
    # Exact but for rounding: the adapter on the base as it lies on disk.
    torch.testing.assert_close(hidden_of(inputs, plain.inner), answer, rtol=0, atol=1e-4)
    # As close to the tuned model as the base is to its four bits (this one has random weights of
    # unusual size, and suffers from four bits more than a trained one).
    before = hidden_of(inputs, quantised.inner)
    assert 0 < distance(before, answer) < 1.5 * untuned
    # And nothing but the four bits makes the difference.
    with torch.no_grad():
        rounded = dict(quantised.inner.named_parameters())
        for name, parameter in plain.inner.named_parameters():
            packed: Any = rounded[name]
            if not packed.is_floating_point():
                parameter.copy_(dequantize_4bit(packed.data, packed.quant_state))
    torch.testing.assert_close(hidden_of(inputs, plain.inner), before, rtol=0, atol=1e-4)


def test_output_layer_cannot_train_beside_a_quantised_model(world: Path) -> None:
    recipe = recipe_of(world, model__quantization="nf4", lora__train_lm_head=True)
    with pytest.raises(RecipeError, match=r"lora\.train_lm_head"):
        open_tuning_inputs(recipe)
