"""One computation, however it is cut: micro-batches, processes, interruptions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same
from tuning_world import make_world, recipe_of, tune, weights_of

from kuea_mllm.errors import UserError
from kuea_mllm.training.run_directory import unfinished_path
from kuea_mllm.tuning.run import run_tuning

WORLD = Path(__file__).with_name("tuning_world.py")
KILLS = 6
TIMES = {"samples_per_second"}
# After ten updates in float32; sums in another order are all that differs.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuning")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def alone(world: Path) -> dict[str, torch.Tensor]:
    """One process, eight micro-batches of one sample."""
    return tune(world, world / "alone")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=TOLERANCE, rtol=0)


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in TIMES} for row in rows]


def test_eight_batches_of_one_are_one_batch_of_eight(
    world: Path, alone: dict[str, torch.Tensor]
) -> None:
    assert_close(alone, tune(world, world / "whole", optim__micro_batch_size=8))
    losses = [[row["loss"] for row in rows_of(world / run)] for run in ("alone", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weighting_by_micro_batch_is_another_computation(
    world: Path, alone: dict[str, torch.Tensor]
) -> None:
    other = tune(world, world / "by_batch", optim__loss_weighting="micro_batch")
    assert max(float((alone[name] - other[name]).abs().max()) for name in alone) > 1e-4


def test_clipping_is_another_computation(world: Path, alone: dict[str, torch.Tensor]) -> None:
    other = tune(world, world / "clipped", optim__max_grad_norm=0.01)
    unclipped = tune(world, world / "unclipped", optim__max_grad_norm=0)
    for weights in (other, unclipped):
        assert max(float((alone[name] - weights[name]).abs().max()) for name in alone) > 1e-5


def test_recomputed_activations_and_small_chunks_change_nothing(
    world: Path, alone: dict[str, torch.Tensor]
) -> None:
    other = tune(
        world, world / "other", runtime__gradient_checkpointing=False, runtime__loss_chunk=3
    )
    assert_close(alone, other)


def run_two(task: str, out: Path, world: Path, **changes: Any) -> list[str]:
    """Run a task of `tuning_world` in two processes and return what they print."""
    words = [task, str(out), str(world), *([json.dumps(changes)] if changes else [])]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORLD), *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out for out, _ in outputs]


def test_two_processes_equal_one(world: Path, alone: dict[str, torch.Tensor]) -> None:
    outputs = run_two("group", world / "two", world)
    assert_close(alone, weights_of(world / "two"))
    losses = [[row["loss"] for row in rows_of(world / run)] for run in ("alone", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Both processes' samples are counted.
    found = json.loads(outputs[0].splitlines()[-1])
    manifest = json.loads((world / "alone" / "adapter" / "kuea.json").read_text())
    assert found["data"]["samples"] == manifest["data"]["samples"]


def test_divided_weights_stopped_and_resumed_equal_one_process(
    world: Path, alone: dict[str, torch.Tensor]
) -> None:
    found = json.loads(run_two("sharded", world / "divided", world)[0].splitlines()[-1])
    assert_close(alone, weights_of(world / "divided"))
    records = [
        json.loads((world / run / "adapter" / "kuea.json").read_text())
        for run in ("alone", "divided")
    ]
    assert records[1]["resumed_at"] == [4]
    # Of two layers each process always held one half, and the record still counts the whole.
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert found["held"] == [[layers // 2, layers]]
    # At no time did both hold the whole model: one loaded after the other, in both sessions.
    times = sorted(tuple(turn) for turns in found["turns"] for turn in turns)
    assert len(times) == 4
    assert all(end <= begin for (_, end), (begin, _) in pairwise(times))
    assert records[0]["trained"] == records[1]["trained"]
    assert records[0]["vision_tower"] == records[1]["vision_tower"]


def test_output_layer_is_trained_and_merged_by_two_processes_as_by_one(world: Path) -> None:
    recipe = recipe_of(world, lora__train_lm_head=True)
    run_tuning(recipe, world / "head_one", merge=True, progress=False)
    run_two("group", world / "head_two", world, lora__train_lm_head=True, merge=True)
    one, two = (weights_of(world / run) for run in ("head_one", "head_two"))
    assert any("lm_head" in name for name in one)
    assert_close(one, two)
    merged = [world / run / "merged" / "model.safetensors" for run in ("head_one", "head_two")]
    assert_close(*map(load_file, merged))


def test_run_of_two_processes_is_resumed_by_one(
    world: Path, alone: dict[str, torch.Tensor]
) -> None:
    # Stopped in the sixth update, of four micro-batches in each process.
    run_two("group", world / "handed", world, stop=22, checkpoint__every_steps=1)
    unfinished = unfinished_path(world / "handed")
    assert sorted(path.name for path in (unfinished / "checkpoints").iterdir())[-1] == (
        "checkpoint-5"
    )
    run_tuning(recipe_of(world), world / "handed", progress=False, resume=True)
    assert_close(alone, weights_of(world / "handed"))
    log = (world / "handed" / "run.log").read_text()
    assert "1 processes now, were 2" in log


def test_number_of_micro_batches_that_was_stated_is_that_of_one_process(world: Path) -> None:
    stated = {"optim__batch_size": None, "optim__accumulation": 4}
    run_two("group", world / "stated", world, stop=22, checkpoint__every_steps=1, **stated)
    with pytest.raises(UserError, match=r"optim\.batch_size' is 4, .* started with 8"):
        run_tuning(recipe_of(world, **stated), world / "stated", progress=False, resume=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, WORLD, "kills", folder, str(KILLS), "0"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) == KILLS
    return folder / "whole", folder / "killed"


def test_killed_and_resumed_run_is_the_same_bit_for_bit(killed: tuple[Path, Path]) -> None:
    assert_same(*(weights_of(run) for run in killed))
    assert_same(*(rows_of(run) for run in killed))
    states = [
        torch.load(next((run / "checkpoints").glob("checkpoint-*")) / "optimizer.pt")
        for run in killed
    ]
    assert_same(*states)


def test_killed_run_counts_each_sample_once(killed: tuple[Path, Path]) -> None:
    counts = [json.loads((run / "adapter" / "kuea.json").read_text())["data"] for run in killed]
    assert counts[0] == counts[1]
