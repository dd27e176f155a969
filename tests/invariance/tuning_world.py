"""A tiny tuning through the real trainer, in one process or several; it can be killed, too.

As a program it is one of these:
    group RESULT FOLDER [JSON] one process of a group (torchrun's variables); JSON: changes to the
                               recipe, "stop" a micro-batch to stop at, "merge"
    sharded RESULT FOLDER      the same with divided weights, stopped once and resumed
    kills FOLDER COUNT SEED    `whole` from start to end, `killed` with that many `kill -9`
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from tiny_llava_files import write_tiny_llava

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.training.distributed import gather_objects, init_if_launched, leave
from kuea_mllm.training.run_directory import unfinished_path
from kuea_mllm.tuning import assemble
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.run import TuningResult, run_tuning
from kuea_mllm.tuning.trainer import TuningTrainer

RECORDS = 38
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "left",
    "right",
    "big",
    "small",
    "cat",
    "dog",
    "hat",
    "tree",
    "a",
    "the",
    "is",
    "of",
]


def make_world(folder: Path) -> None:
    """Write a model, pictures and conversations: with a picture and without, short and long."""
    write_tiny_llava(folder / "model")
    numbers = np.random.default_rng(0)
    (folder / "images").mkdir()
    records = []
    for number in range(RECORDS):
        has_image = number % 4 != 3
        turns = []
        for turn in range(1 + number % 3):
            tag = "<image>\n" if has_image and turn == 0 else ""
            for speaker, text in (("human", tag), ("gpt", "")):
                words = numbers.choice(WORDS, int(numbers.integers(1, 9)))
                turns.append({"from": speaker, "value": text + " ".join(words)})
        record = {"id": f"r{number}", "conversations": turns}
        if has_image:
            record["image"] = f"{number}.png"
            pixels = numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        records.append(record)
    (folder / "mixture.json").write_text(json.dumps(records))


def recipe_of(folder: Path, **changes) -> LoraRecipe:
    """Return the recipe of the tiny run; keys of `changes` have __ for a dot."""
    content = {
        "kind": "lora",
        "model": {"path": str(folder / "model")},
        "data": {
            "file": str(folder / "mixture.json"),
            "images": str(folder / "images"),
            "max_length": 420,
            "workers": 0,
        },
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "optim": {"lr": 2e-3, "projector_lr": 1e-3, "batch_size": 8, "epochs": 2},
        "runtime": {"device": "cpu", "dtype": "float32", "seed": 3, "log_every": 2},
        "checkpoint": {},
    }
    for path, value in changes.items():
        section, key = path.split("__")
        content[section][key] = value
    return LoraRecipe.parse(content, origin="test")


def tune(folder: Path, out: Path, **changes) -> dict[str, torch.Tensor]:
    """Run it and return what was trained."""
    run_tuning(recipe_of(folder, **changes), out, progress=False)
    return weights_of(out)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def run_killed(folder: Path, out: Path, *, after_batches: int, wait: float) -> bool:
    """Run in a child; kill it some time after it began that many batches; tell if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        step = TuningTrainer.training_step

        def announced(*args, **kwargs):
            os.write(write, b".")
            return step(*args, **kwargs)

        TuningTrainer.training_step = announced
        code = 1
        try:
            recipe = recipe_of(
                folder, lora__dropout=0.1, checkpoint__every_steps=1, data__workers=1
            )
            run_tuning(recipe, out, progress=False, resume=unfinished_path(out).exists())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    begun = 0
    while begun < after_batches and (found := os.read(read, after_batches - begun)):
        begun += len(found)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed")
    return os.WIFSIGNALED(status)


def kill_often(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    make_world(folder)
    forever = 10**9
    run_killed(folder, folder / "whole", after_batches=forever, wait=0)
    choose, killed = random.Random(seed), 0
    while not (folder / "killed").exists():
        after = choose.randint(1, 12) if killed < kills else forever
        killed += run_killed(
            folder, folder / "killed", after_batches=after, wait=choose.uniform(0, 0.03)
        )
    sys.stdout.write(f"{killed}\n")


def stop_at(batch: int) -> None:
    """Let the model fail at that micro-batch."""
    forward, begun = TuningModel.forward, []

    def failing(self, **given):
        begun.append(None)
        if len(begun) == batch:
            raise RuntimeError("stopped")
        return forward(self, **given)

    TuningModel.forward = failing


def run_in_group(result: Path, folder: Path, changes: dict) -> None:
    init_if_launched("cpu")
    torch.set_num_threads(1)
    merge, stop = changes.pop("merge", False), changes.pop("stop", 0)
    recipe = recipe_of(folder, **changes)
    if stop:
        stop_at(stop)
        try:
            run_tuning(recipe, result, progress=False)
        except RuntimeError:
            leave()
        return
    found: TuningResult = run_tuning(recipe, result, merge=merge, progress=False)
    leave()
    if os.environ["RANK"] == "0":
        sys.stdout.write(json.dumps(found.to_dict()) + "\n")


def run_sharded(result: Path, folder: Path) -> None:
    """Run with divided weights.

    Print what a process held of them between forward and backward, and when each was loading.
    """
    init_if_launched("cpu")
    torch.set_num_threads(1)
    load, loading = assemble._load, []

    def timed(*args):
        # The clock is that of the machine.
        begun = time.monotonic()
        model = load(*args)
        time.sleep(0.05)
        loading.append((begun, time.monotonic()))
        return model

    assemble._load = timed
    forward = TuningModel.forward
    held: list[tuple[int, int]] = []

    def watched(self, **batch):
        loss = forward(self, **batch)
        divided = [p for p in self.parameters() if isinstance(p, DTensor)]
        held.append((sum(p.to_local().numel() for p in divided), sum(p.numel() for p in divided)))
        if len(held) == 22:  # in the sixth update
            raise RuntimeError("stopped")
        return loss

    TuningModel.forward = watched
    recipe = recipe_of(folder, runtime__sharding="fsdp", checkpoint__every_steps=2)
    try:
        run_tuning(recipe, result, progress=False)
    except RuntimeError:
        run_tuning(recipe, result, progress=False, resume=True)
    turns = gather_objects(loading)
    leave()
    if os.environ["RANK"] == "0":
        sys.stdout.write(json.dumps({"held": sorted(set(held)), "turns": turns}) + "\n")


def main() -> None:
    task, *words = sys.argv[1:]
    if task == "group":
        run_in_group(Path(words[0]), Path(words[1]), json.loads((words[2:] or ["{}"])[0]))
    elif task == "sharded":
        run_sharded(Path(words[0]), Path(words[1]))
    else:
        kill_often(Path(words[0]), int(words[1]), int(words[2]))


if __name__ == "__main__":
    main()
