"""Steps on the mini world that the quickstart and the studies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.alignment.run import AlignmentResult, run_alignment
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.evaluation.runner import evaluate
from kuea_mllm.manifest import current_command
from kuea_mllm.miniworld.encoder_eval import evaluate_encoder
from kuea_mllm.miniworld.mixture import IMAGE_FOLDER
from kuea_mllm.reporting.alignment import draw_alignment_figures
from kuea_mllm.reporting.tuning import draw_tuning_figures
from kuea_mllm.swapping import SwapReceipt, swap_tower_files
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.tuning.run import TuningResult, run_tuning

# Small models answer fastest in large batches; answers do not depend on it.
EVAL_BATCH = 100


def align_miniworld(
    world: Path,
    images: Path,
    heldout: Path,
    out: Path,
    *,
    settings: dict[str, object],
    overrides: Sequence[str] = (),
    show_progress: bool,
) -> AlignmentResult:
    """Align the CLIP of a world with its teacher by the shipped recipe, with some keys changed."""
    fixed = {
        "student.model": str(world / "clip"),
        "teacher.model": str(world / "teacher"),
        "data.images": str(images),
        "data.heldout": str(heldout),
        "runtime.device": "cpu",
    }
    recipe = load_recipe(
        "align/miniworld", AlignRecipe, settings={**fixed, **settings}, overrides=overrides
    )
    return run_alignment(recipe, out, progress=show_progress, finish=draw_alignment_figures)


def score_encoder(tower: Path, world: Path, *, split: str, per_set: int) -> dict[str, float]:
    """Score a tower by itself: zero-shot, retrieval, probes, in percent."""
    return evaluate_encoder(load_tower(tower).model, world / "clip", split=split, per_set=per_set)


def swap_into_llava(world: Path, tower: Path, out: Path) -> SwapReceipt:
    """Put an aligned tower into the LLaVA of a world."""
    base = world / "llava"
    return swap_tower_files(
        base,
        load_tower(tower),
        out,
        adapter=adapter_for(base),
        command=current_command(),
    )


def tune_miniworld(
    base: Path,
    mixture: Path,
    out: Path,
    *,
    settings: Mapping[str, object],
    overrides: Sequence[str] = (),
    show_progress: bool,
) -> TuningResult:
    """Tune a LLaVA by the shipped recipe, with some keys changed, and merge it.

    Args:
        base: Model directory.
        mixture: Result of `write_mixture`.
        out: Directory to create.
        settings: Keys of the recipe `lora/miniworld` that are changed.
        overrides: The same as `key.path=value`; they win.
        show_progress: Show a progress bar.
    """
    fixed = {
        "model.path": str(base),
        "data.file": str(mixture),
        "data.images": str(mixture.parent / IMAGE_FOLDER),
        "runtime.device": "cpu",
    }
    recipe = load_recipe(
        "lora/miniworld", LoraRecipe, settings={**fixed, **settings}, overrides=overrides
    )
    return run_tuning(recipe, out, merge=True, progress=show_progress, finish=draw_tuning_figures)


def answer_questions(
    model: Path, tasks: Path, out: Path, *, seed: int, show_progress: bool
) -> dict[str, Any]:
    """Let a model answer the tasks of a folder; lmms-eval scores it."""
    return evaluate(
        model,
        [str(tasks)],
        out,
        batch_size=EVAL_BATCH,
        device="cpu",
        seed=seed,
        command=current_command(),
        show_progress=show_progress,
        # What an interrupted workflow left behind is no reason to refuse the next.
        restart=True,
    )
