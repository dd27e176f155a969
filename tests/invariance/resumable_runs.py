"""A tiny alignment that can be killed at any moment.

Run as a program: FOLDER KILLS SEED. It makes towers and images, runs `whole` from start to end, and
`killed` with that many `kill -9` on the way, each followed by a resumed run. The runs are forked
children, since importing takes longer than training here.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from kuea_mllm.alignment.run import run_alignment
from kuea_mllm.alignment.trainer import AlignmentTrainer
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.training.run_directory import unfinished_path

STEPS, SIDE = 80, 32
SETTINGS = {
    "optim.steps": STEPS,
    "optim.batch_size": 6,
    "optim.warmup_steps": 5,
    "data.heldout_count": 4,
    "data.augment": "flip",
    "runtime.device": "cpu",
    "runtime.log_every": 3,
    "runtime.measure_every": 10,
    "checkpoint.every_steps": 2,
    "monitor.early_stop.patience": 1000,
}


def make_world(folder):
    """Write student, teacher and images of a size that trains in milliseconds."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPVisionConfig(
        **shape, intermediate_size=32, projection_dim=12, image_size=SIDE, patch_size=16
    )
    dino = Dinov2Config(**shape, mlp_ratio=2, image_size=SIDE, patch_size=16)
    for name, model in (
        ("clip", CLIPVisionModelWithProjection(clip)),
        ("teacher", Dinov2Model(dino)),
    ):
        model.save_pretrained(folder / name)
        text = (ASSETS / name / "preprocessor_config.json").read_text()
        (folder / name / "preprocessor_config.json").write_text(text)
    (folder / "images").mkdir()
    numbers = np.random.default_rng(0)
    for number in range(40):
        pixels = numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")


def recipe_of(folder, **changes):
    """Return the recipe of the tiny run; keys of `changes` have __ for a dot."""
    places = {
        "student.model": str(folder / "clip"),
        "teacher.model": str(folder / "teacher"),
        "data.images": str(folder / "images"),
    }
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("align/miniworld", AlignRecipe, settings={**SETTINGS, **places, **changes})


def run_killed(folder, out, *, after_steps, wait):
    """Run in a child; kill it some time after it began that many steps; tell if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        step = AlignmentTrainer.training_step

        def announced(*args, **kwargs):
            os.write(write, b".")
            return step(*args, **kwargs)

        AlignmentTrainer.training_step = announced
        code = 1
        try:
            run_alignment(
                recipe_of(folder), out, progress=False, resume=unfinished_path(out).exists()
            )
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    begun = 0
    while begun < after_steps and (found := os.read(read, after_steps - begun)):
        begun += len(found)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed")
    return os.WIFSIGNALED(status)


def main():
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    make_world(folder)
    forever = 10**9
    run_killed(folder, folder / "whole", after_steps=forever, wait=0)
    choose, killed = random.Random(seed), 0
    while not (folder / "killed").exists():
        after_steps = choose.randint(1, 8) if killed < kills else forever
        killed += run_killed(
            folder, folder / "killed", after_steps=after_steps, wait=choose.uniform(0, 0.03)
        )
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main()
