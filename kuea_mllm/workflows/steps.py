"""Steps on the mini world that the quickstart and the study share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.alignment.run import AlignmentResult, run_alignment
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.evaluation.runner import evaluate
from kuea_mllm.manifest import current_command
from kuea_mllm.miniworld.encoder_eval import evaluate_encoder
from kuea_mllm.reporting.alignment import draw_alignment_figures
from kuea_mllm.swapping import SwapReceipt, swap_tower_files
from kuea_mllm.towers.load import load_tower

# Small models answer fastest in large batches; answers do not depend on it.
EVAL_BATCH = 100


def align_miniworld(
    world: Path,
    images: Path,
    heldout: Path,
    out: Path,
    *,
    settings: dict[str, object],
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
    recipe = load_recipe("align/miniworld", AlignRecipe, settings={**fixed, **settings})
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
    )
