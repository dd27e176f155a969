"""Packed rows train what single samples train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same
from torch import Tensor
from tuning_world import RECORDS, make_world, recipe_of, tune, weights_of
from typer.testing import CliRunner

from kuea_mllm.cli.main import app
from kuea_mllm.errors import Interrupted
from kuea_mllm.training.distributed import world_size
from kuea_mllm.tuning.assemble import load_tuning_model, make_sampler
from kuea_mllm.tuning.inputs import TuningInputs, open_tuning_inputs
from kuea_mllm.tuning.loss import supervised_positions
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.run import run_tuning
from kuea_mllm.tuning.trainer import TuningTrainer

TOLERANCE = 1e-5
PACKED = {
    "data__packing": True,
    "data__max_length": 900,
    "optim__batch_size": 3,
    "optim__micro_batch_size": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("packing")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUEA_MLLM_CACHE", str(folder / "cache"))
        yield folder


def inputs_of(world: Path, **changes: Any) -> TuningInputs:
    return open_tuning_inputs(recipe_of(world, **changes))


@pytest.fixture(scope="module")
def model(world: Path) -> TuningModel:
    """The world's model with LoRA layers that do something."""
    made = load_tuning_model(inputs_of(world))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.05 * noise)
    return made.train()


def losses(model: TuningModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed loss of each sample of a batch; leave gradients of all of them."""
    batch = dict(batch)
    count = len(batch.pop("positions"))
    del batch["left_out"], batch["unlabelled"]
    places, targets = supervised_positions(batch["labels"])
    if "position_ids" in batch:
        # What fills a row up begins anew, too, behind all samples; nothing of it is learned.
        begins = (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    else:
        begins = torch.arange(count).repeat_interleave(batch["labels"].shape[1])
    of_place = begins[places]
    found = torch.zeros(int(begins.max()) + 1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for sample in of_place.unique().tolist():
        mine = of_place == sample
        loss = model(**inputs, predicting=places[mine], targets=targets[mine])
        loss.backward()
        found[sample] = loss.detach()
    return found


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_packed_loss_and_gradient_are_those_of_the_samples_alone(
    world: Path, model: TuningModel, micro_batch: int
) -> None:
    """Rows with images and text alone in one, and rows that are filled up."""
    changes = {"data__max_length": 1200, "optim__batch_size": micro_batch}
    packed = inputs_of(
        world,
        **changes,
        data__packing=True,
        data__group_by_modality=False,
        optim__micro_batch_size=micro_batch,
    )
    single = inputs_of(world, **changes)
    sampler = make_sampler(packed, accumulation=1)
    mixed = 0
    for batch in [*sampler][:3]:
        collated = packed.collator([packed.examples[row] for row in batch])
        positions = collated["positions"].tolist()
        has_image = {single.mixture.record(p)["image"] is not None for p in positions}
        mixed += len(positions) > 2 * len(batch) and has_image == {True, False}
        model.zero_grad()
        together = losses(model, collated)
        gradients = gradients_of(model)
        model.zero_grad()
        alone = [losses(model, single.collator([single.examples[p]]))[0] for p in positions]
        # Leave out what fills a row up.
        lengths = [[int(packed.token_counts[p]) for p in row] for row in batch]  # type: ignore[index]
        width = max(map(sum, lengths))
        is_sample = torch.tensor(
            [each for row in lengths for each in [True] * len(row) + [False] * (sum(row) < width)]
        )
        torch.testing.assert_close(together[is_sample], torch.stack(alone), atol=0, rtol=TOLERANCE)
        for name, gradient in gradients_of(model).items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                gradients[name], gradient, atol=TOLERANCE * max(scale, 1e-3), rtol=TOLERANCE
            )
    assert mixed


def gradients_of(model: TuningModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    tune(world, world / "whole", **PACKED, lora__dropout=0.1, checkpoint__every_steps=1)
    return world / "whole"


def test_packed_run_visits_every_sample_in_every_epoch(whole: Path) -> None:
    data = json.loads((whole / "adapter" / "kuea.json").read_text())["data"]
    assert data["samples"] == 2 * RECORDS
    log = (whole / "run.log").read_text()
    assert f"{RECORDS} samples packed in " in log
    assert "rows_per_second" in (whole / "metrics.jsonl").read_text()


def test_interrupted_packed_run_goes_on_as_if_it_had_not_stopped(
    world: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**PACKED, "lora__dropout": 0.1, "checkpoint__every_steps": 1}
    step, taken = TuningTrainer.training_step, 0

    def failing(*given: Any, **named: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 8:  # in the middle of an update
            raise Interrupted("power is gone")
        return step(*given, **named)

    monkeypatch.setattr(TuningTrainer, "training_step", failing)
    with pytest.raises(Interrupted):
        run_tuning(recipe_of(world, **changes), world / "stopped", progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(world / "cache"))
    run_tuning(recipe_of(world, **changes), world / "stopped", progress=False, resume=True)
    assert_same(weights_of(whole), weights_of(world / "stopped"))


def test_packed_micro_batches_of_one_row_are_one_of_three(world: Path) -> None:
    weights = [
        tune(world, world / name, **PACKED | {"optim__micro_batch_size": rows, "optim__epochs": 1})
        for name, rows in (("ones", 1), ("three", 3))
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-6, rtol=0)


def test_command_line_packs(world: Path) -> None:
    out = world / "cli"
    answer = CliRunner().invoke(
        app,
        [
            "lora",
            "--out", str(out),
            "--model", str(world / "model"),
            "--data", str(world / "mixture.json"),
            "--images", str(world / "images"),
            "--device=cpu",
            "--rank=4",
            "--max-length=900",
            "--batch-size=4",
            "--workers=2",
            "--set", "data.packing=true",
            "--set", "runtime.dtype=float32",
            "--json",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["data"]["samples"] == RECORDS
    assert world_size() == 1
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
