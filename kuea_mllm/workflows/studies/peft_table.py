"""`kuea-mllm world peft`: the paper's table of baseline, +align, +peft and +both, in miniature.

Every model comes out of the code of the commands: align, swap, lora with --merge, eval. LoRA of the
base and LoRA of the swapped model see the same conversations in the same order, from the same
initial LoRA weights.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm import __version__
from kuea_mllm.config.recipes import find_recipe
from kuea_mllm.errors import UserError
from kuea_mllm.io import atomic_directory, read_json, write_json, write_text
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions
from kuea_mllm.workflows.studies.worlds import (
    TRAIN_IMAGES,
    find_world,
    is_measured,
    obtain_world,
    open_study,
    run_seeds,
    world_identity,
    write_inputs,
)

if TYPE_CHECKING:
    from kuea_mllm.tuning.run import TuningResult

MODELS = ("baseline", "align", "peft", "both")
# As many as the 300 updates of 64 samples need, so that none is seen twice.
CONVERSATIONS = 20_000


@dataclass(frozen=True)
class PeftSettings:
    """What makes two studies comparable; a study resumes only under equal settings.

    Attributes:
        questions: Questions for each task.
        split: Scans that are asked about.
        align: Overrides of the recipe `align/miniworld`, `key.path=value`.
        lora: Overrides of the recipe `lora/miniworld`.
        train_images: Pictures to align on.
        conversations: Conversations to tune on.
        recipes: Checksum of both recipes.
        version: Of this package.
    """

    questions: int
    split: str
    align: tuple[str, ...]
    lora: tuple[str, ...]
    train_images: int = TRAIN_IMAGES
    conversations: int = CONVERSATIONS
    recipes: str = ""
    version: str = __version__


def run_peft_study(
    out: Path,
    *,
    seeds: int,
    worlds: Path | None,
    questions: int,
    split: str,
    jobs: int,
    align: Sequence[str] = (),
    lora: Sequence[str] = (),
    train_images: int = TRAIN_IMAGES,
    conversations: int = CONVERSATIONS,
) -> dict[str, Any]:
    """Make the four models of each world, ask them all, and write table and report.

    A study that was interrupted goes on where it stopped: worlds that are finished are read, not
    repeated.

    Args:
        out: Directory of the study.
        seeds: Number of worlds, seeds 0 to seeds - 1.
        worlds: Built worlds `seed0`, `seed1`, ... to use; None builds them in `out`.
        questions: Questions for each task.
        split: Scans that are asked about.
        jobs: Worlds in work at once, each in a process of its own.
        align: Overrides of the recipe `align/miniworld`, `key.path=value`.
        lora: Overrides of the recipe `lora/miniworld`.
        train_images: Pictures to align on.
        conversations: Conversations to tune on.

    Returns:
        The content of `out/peft_table.json`.

    Raises:
        OutputError: If `out` holds a study with other settings.
    """
    recipes = "".join(find_recipe(f"{kind}/miniworld").text for kind in ("align", "lora"))
    settings = PeftSettings(
        questions,
        split,
        tuple(align),
        tuple(lora),
        train_images,
        conversations,
        hashlib.sha256(recipes.encode()).hexdigest(),
    )
    given = {seed: find_world(worlds, seed) for seed in range(seeds)}
    open_study(out, asdict(settings))
    write_inputs(out, split=split, train_images=train_images, questions=questions)
    _write_conversations(out, conversations)
    todo = [seed for seed in range(seeds) if not is_measured(out, seed, given[seed])]
    LOGGER.info("%d of %d seeds to do, %d at once", len(todo), seeds, jobs)
    run_seeds(functools.partial(_study_seed, out, given, settings), todo, jobs=jobs)
    return _write_record(out, seeds, settings)


def make_peft_models(
    world: Path,
    swapped: Path,
    mixture: Path,
    out: Path,
    *,
    seed: int,
    overrides: Sequence[str] = (),
    show_progress: bool = False,
) -> tuple[dict[str, Path], dict[str, TuningResult]]:
    """Tune a world's LLaVA and its swapped copy in the same way.

    Args:
        world: Folder of the world.
        swapped: Its LLaVA with the aligned tower.
        mixture: Conversations, from `write_mixture`.
        out: Folder that the runs `lora-peft` and `lora-both` are created in.
        seed: Decides the order of the conversations and the LoRA weights at the start.
        overrides: Overrides of the recipe `lora/miniworld`.
        show_progress: Show progress bars.

    Returns:
        Directories of the four models, and both tunings.
    """
    from kuea_mllm.tuning.run import MERGED
    from kuea_mllm.workflows.studies.steps import tune_miniworld

    models = {"baseline": world / "llava", "align": swapped}
    tuned = {}
    for name, base in (("peft", models["baseline"]), ("both", swapped)):
        run = out / f"lora-{name}"
        tuned[name] = tune_miniworld(
            base,
            mixture,
            run,
            settings={"runtime.seed": seed},
            overrides=overrides,
            show_progress=show_progress,
        )
        models[name] = run / MERGED
    if tuned["peft"].data != tuned["both"].data:
        raise UserError(
            f"the two tunings in {out} saw different data: {tuned['peft'].data} and "
            f"{tuned['both'].data}.",
            "Was the mixture changed meanwhile? Start again.",
        )
    return models, tuned


def _study_seed(
    out: Path, given: Mapping[int, Path | None], settings: PeftSettings, seed: int
) -> None:
    # Heavy imports belong to the process that does the work.
    from kuea_mllm.miniworld.mixture import MIXTURE_FILE
    from kuea_mllm.workflows.studies.peft_scores import read_answers, summarise_peft
    from kuea_mllm.workflows.studies.steps import align_miniworld, answer_questions, swap_into_llava

    world = obtain_world(out, seed, given[seed])
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with atomic_directory(out / f"seed{seed}") as folder:
        aligned = align_miniworld(
            world,
            out / "images",
            out / "heldout",
            folder / "align",
            settings={"runtime.seed": seed},
            overrides=settings.align,
            show_progress=False,
        )
        seconds["align"] = aligned.seconds
        receipt = swap_into_llava(world, aligned.tower, folder / "llava-aligned")
        models, tuned = make_peft_models(
            world,
            folder / "llava-aligned",
            out / "conversations" / MIXTURE_FILE,
            folder,
            seed=seed,
            overrides=settings.lora,
        )
        seconds |= {f"lora {name}": result.seconds for name, result in tuned.items()}
        towers = {}
        for name in MODELS:
            summary = answer_questions(
                models[name],
                out / "tasks",
                folder / "results" / name,
                seed=seed,
                show_progress=False,
            )
            seconds[f"eval {name}"] = summary["seconds"]
            towers[name] = summary["model"]["tower_fingerprint"]
        _require_towers(towers, receipt.fingerprint_before, receipt.fingerprint_after)
        scores = {name: read_answers(folder / "results" / name) for name in MODELS}
        result = {
            "seed": seed,
            "world": world_identity(world),
            "scores": {
                model: {name: row["mean"] for name, row in columns.items()}
                for model, columns in summarise_peft([scores])["scores"].items()
            },
            "alignment": {"before": aligned.before, "after": aligned.after},
            "tuning": {name: _losses(found.directory) for name, found in tuned.items()},
            "towers": towers,
            "seconds": {**seconds, "all": round(time.perf_counter() - started, 1)},
        }
        write_json(folder / "result.json", result)
    LOGGER.info("seed %d: %s", seed, result["scores"])


def _require_towers(towers: Mapping[str, str], original: str, aligned: str) -> None:
    wanted = {"baseline": original, "align": aligned, "peft": original, "both": aligned}
    for name, fingerprint in wanted.items():
        if towers[name] != fingerprint:
            raise UserError(f"model {name} answered with another vision tower than it should have.")


def _losses(run: Path) -> dict[str, float]:
    from kuea_mllm.reporting.alignment import read_metrics

    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    return {"first": losses[0], "last_five_rows": statistics.fmean(losses[-5:])}


def _write_conversations(out: Path, count: int) -> None:
    from kuea_mllm.miniworld.mixture import write_mixture

    if not (out / "conversations").exists():
        write_mixture(out / "conversations", split="train", count=count, seed=0)


def _write_record(out: Path, seeds: int, settings: PeftSettings) -> dict[str, Any]:
    from kuea_mllm.reporting.html import write_quickstart_report
    from kuea_mllm.reporting.peft import peft_markdown, peft_section
    from kuea_mllm.workflows.studies.peft_scores import read_answers, summarise_peft

    folders = [out / f"seed{seed}" for seed in range(seeds)]
    table = summarise_peft(
        [{name: read_answers(folder / "results" / name) for name in MODELS} for folder in folders]
    )
    record: dict[str, Any] = {
        "schema_version": 1,
        "settings": asdict(settings),
        "seeds": list(range(seeds)),
        **table,
        "per_seed": [read_json(folder / "result.json") for folder in folders],
        "versions": library_versions(),
        "command": current_command(),
    }
    write_json(out / "peft_table.json", record)
    write_text(out / "peft_table.md", peft_markdown(record))
    write_quickstart_report(
        out / "report.html",
        title="Alignment and LoRA in the mini world",
        subtitle="Baseline, +align, +peft, +both",
        sections=[peft_section(record)],
        provenance=[*library_versions().items(), ("command", record["command"])],
    )
    return record
