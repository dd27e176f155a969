"""One process, several processes and micro-batches are one computation (gloo, CPU)."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from global_batch_world import OBJECTIVES, STEPS, Outcome, train

WORLD = Path(__file__).with_name("global_batch_world.py")
# objective/precision/micro-batch: micro-batches of 5 do not divide a batch of 12, nor 4 its half.
GROUPS = {
    2: [
        "kuea-direct/fp64/0",
        "kuea-log/fp32/0",
        "kuea-log/fp64/4",
        "every-term/fp64/0",
        "every-term/fp64/4",
        "every-term/fp32/4",
        "patches-only/fp64/4",
    ],
    4: ["every-term/fp64/2"],
}
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}
# Losses are squares of small differences of numbers near one, so float32 rounds them more coarsely
# than it rounds weights. It is float64 that shows the computation to be the same.
LOSS_TOLERANCE = {"fp32": 5e-6, "fp64": 1e-12}


def start_group(count, result, cases):
    """Start processes as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(WORLD), str(result), *cases],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What each group of processes gave, by number of processes and case."""
    folder = tmp_path_factory.mktemp("groups")
    found = {}
    for count, cases in GROUPS.items():
        processes = start_group(count, folder / f"{count}.pt", cases)
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
        outcomes = torch.load(folder / f"{count}.pt")
        found |= {(count, case): Outcome(**outcomes[case]) for case in cases}
    return found


@pytest.fixture(scope="module")
def alone():
    """One process with whole batches: what all others have to equal."""
    found = {}

    def get(objective, precision):
        if (objective, precision) not in found:
            found[objective, precision] = train(objective, precision)
        return found[objective, precision]

    return get


def compare(found, expected, precision):
    assert len(found.losses) == len(expected.losses) == STEPS
    error = (found.losses - expected.losses).abs().max() / expected.losses.abs().max()
    assert error <= LOSS_TOLERANCE[precision], f"losses: {error:.2g}"
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        # Its gradient is zero (softmax ignores what is added to all scores of a row), and AdamW
        # makes steps of full size out of the rounding noise that is left.
        if re.search(r"k_proj\.bias$", name):
            continue
        error = (found.weights[name].double() - value.double()).norm() / value.double().norm()
        assert error <= TOLERANCE[precision], f"{name}: {error:.2g}"
        # Patch terms read nothing behind the second layer.
        is_read = re.search(r"^objective|layers\.[01]\.", name)
        assert not is_read or not value.equal(expected.start[name]), f"{name} was not trained"


@pytest.mark.parametrize("group", [(n, case) for n, cases in GROUPS.items() for case in cases])
def test_processes_equal_one_process(groups, alone, group):
    objective, precision, _ = group[1].split("/")
    compare(groups[group], alone(objective, precision), precision)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_equal_whole_batches(alone, objective, precision):
    found = train(objective, precision, 5)
    compare(found, alone(objective, precision), precision)


def test_batch_cut_into_separate_losses_would_be_noticed(alone):
    """Guard of the tests above: pairs of half a batch give another loss."""
    expected = alone("kuea-log", "fp64")
    halves = train("kuea-log", "fp64", batch_size=6)
    assert (halves.losses[0] - expected.losses[0]).abs() / expected.losses[0] > 1e-3
