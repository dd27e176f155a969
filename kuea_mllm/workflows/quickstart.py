"""`kuea-mllm quickstart`: every step of the method on the mini world, and a report to look at."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from kuea_mllm.alignment.run import AlignmentResult
from kuea_mllm.evaluation.comparing.compare import compare_results
from kuea_mllm.io import disk_errors_named, read_json, require_free_output, write_json
from kuea_mllm.manifest import library_versions
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.build_flamingo import build_flamingo
from kuea_mllm.miniworld.images import contact_sheet, write_images
from kuea_mllm.miniworld.mixture import write_mixture
from kuea_mllm.miniworld.tasks import write_tasks
from kuea_mllm.reporting.alignment import alignment_section
from kuea_mllm.reporting.blocks import Bullets, Code, Figure, KeyValues, Paragraph, Section
from kuea_mllm.reporting.encoder import encoder_table
from kuea_mllm.reporting.examples import pick_examples
from kuea_mllm.reporting.html import write_quickstart_report
from kuea_mllm.reporting.pages import comparison_sections, comparison_summary
from kuea_mllm.reporting.peft import peft_section, peft_text
from kuea_mllm.reporting.shots import shots_comparison_text, shots_section
from kuea_mllm.reporting.tables import comparison_text
from kuea_mllm.reporting.view import parse_comparison
from kuea_mllm.swapping import SwapReceipt
from kuea_mllm.workflows.studies.flamingo import compare_in_flamingo
from kuea_mllm.workflows.studies.peft_scores import read_answers, summarise_peft
from kuea_mllm.workflows.studies.peft_table import CONVERSATIONS, make_peft_models
from kuea_mllm.workflows.studies.steps import (
    align_miniworld,
    answer_questions,
    score_encoder,
    swap_into_llava,
)

TRAIN_IMAGES = 12_000
HELDOUT_IMAGES = 512
ENCODER_PICTURES = 1000


def run_quickstart(
    out: Path,
    *,
    steps: int | None,
    questions: int,
    seed: int,
    full: bool = False,
    show_progress: bool,
) -> dict[str, Any]:
    """Carry out the quickstart.

    Args:
        out: Directory to create; removed again if anything fails.
        steps: Alignment steps; None keeps the recipe's.
        questions: Questions for each task.
        seed: Seed of pictures, questions and data order.
        full: Also tune both LLaVAs with LoRA; train a mini Flamingo, and compare the towers in it
            with and without demonstrations.
        show_progress: Show headings and progress bars.

    Returns:
        What was measured, and where the report lies.
    """
    require_free_output(out)
    console = Console(stderr=True, quiet=not show_progress)
    with _removed_on_failure(out):
        started = time.perf_counter()
        last = 7 if full else 5
        images, heldout, tasks = out / "images", out / "heldout", out / "tasks"
        console.rule(f"1/{last}  The mini world", align="left")
        write_images(images, split="train", count=TRAIN_IMAGES, seed=seed)
        write_images(heldout, split="test", count=HELDOUT_IMAGES, seed=seed + 1)
        names = write_tasks(tasks, split="test", questions_per_task=questions, seed=seed)
        sheet = io.BytesIO()
        contact_sheet(split="test", seed=seed).save(sheet, format="PNG")
        (out / "world.png").write_bytes(sheet.getvalue())
        console.print(f"pictures to align on: {images}\nwhat they look like: {out / 'world.png'}")

        console.rule(f"2/{last}  Align the CLIP tower with the teacher", align="left")
        settings: dict[str, object] = {"runtime.seed": seed}
        if steps is not None:
            settings |= {"optim.steps": steps, "optim.warmup_steps": steps // 10}
        aligned = align_miniworld(
            ASSETS, images, heldout, out / "align", settings=settings, show_progress=show_progress
        )

        console.rule(f"3/{last}  Swap the aligned tower into LLaVA", align="left")
        receipt = swap_into_llava(ASSETS, aligned.tower, out / "llava-aligned")
        console.print(
            f"{receipt.tensors_replaced} tensors replaced; tower in use: "
            f"{receipt.fingerprint_before[:19]} before, {receipt.fingerprint_after[:19]} now"
        )

        console.rule(f"4/{last}  Measure both", align="left")
        encoder = {}
        for name, tower in (("original", ASSETS / "clip"), ("aligned", aligned.tower)):
            with console.status(f"zero-shot, retrieval and probes of the {name} tower"):
                encoder[name] = score_encoder(tower, ASSETS, split="test", per_set=ENCODER_PICTURES)
        for name, model in (
            ("original", ASSETS / "llava"),
            ("aligned", out / "llava-aligned"),
        ):
            console.print(f"questions to the {name} LLaVA ({', '.join(names)})")
            answer_questions(
                model, tasks, out / "results" / name, seed=seed, show_progress=show_progress
            )

        console.rule(f"5/{last}  Compare", align="left")
        comparison = compare_results(
            out / "results" / "original", out / "results" / "aligned"
        ).to_json()
        write_json(out / "comparison.json", comparison)
        console.print(comparison_text(comparison))
        lora = flamingo = None
        if full:
            console.rule(f"6/{last}  Tune both LLaVAs with LoRA", align="left")
            lora = _tune_both(out, seed=seed, show_progress=show_progress)
            console.print(*peft_text(lora), sep="\n\n")

            console.rule(f"7/{last}  The same towers in a Flamingo", align="left")
            flamingo = _compare_in_flamingo(
                out, aligned, questions=questions, seed=seed, show_progress=show_progress
            )
            console.print(shots_comparison_text(flamingo))
        seconds = time.perf_counter() - started
        _write_report(
            out,
            sheet=sheet.getvalue(),
            aligned=aligned,
            receipt=receipt,
            encoder=encoder,
            comparison=comparison,
            lora=lora,
            flamingo=flamingo,
            seconds=seconds,
        )
    return {
        "report": str(out / "report.html"),
        "seconds": round(seconds, 1),
        "alignment": {"before": aligned.before, "after": aligned.after},
        "encoder": encoder,
        "comparison": comparison,
        **({} if lora is None else {"lora": lora}),
        **({} if flamingo is None else {"flamingo": flamingo}),
    }


def _compare_in_flamingo(
    out: Path, aligned: AlignmentResult, *, questions: int, seed: int, show_progress: bool
) -> dict[str, Any]:
    build_flamingo(
        out / "flamingo",
        clip=ASSETS / "clip",
        seed=seed,
        questions=questions,
        progress=show_progress,
    )
    record = compare_in_flamingo(
        out / "flamingo",
        aligned.tower,
        out / "flamingo-aligned",
        questions=questions,
        seed=seed,
    )
    write_json(out / "flamingo.json", record)
    return record


def _tune_both(out: Path, *, seed: int, show_progress: bool) -> dict[str, Any]:
    mixture = write_mixture(out / "conversations", split="train", count=CONVERSATIONS, seed=seed)
    models, _ = make_peft_models(
        ASSETS,
        out / "llava-aligned",
        mixture,
        out,
        seed=seed,
        show_progress=show_progress,
    )
    results = {"baseline": out / "results" / "original", "align": out / "results" / "aligned"}
    for name in ("peft", "both"):
        results[name] = out / "results" / name
        answer_questions(
            models[name],
            out / "tasks",
            results[name],
            seed=seed,
            show_progress=show_progress,
        )
    record = summarise_peft([{name: read_answers(place) for name, place in results.items()}])
    write_json(out / "lora.json", record)
    return record


def _write_report(
    out: Path,
    *,
    sheet: bytes,
    aligned: AlignmentResult,
    receipt: SwapReceipt,
    encoder: dict[str, dict[str, float]],
    comparison: dict[str, Any],
    lora: dict[str, Any] | None,
    flamingo: dict[str, Any] | None,
    seconds: float,
) -> None:
    original, candidate = out / "results" / "original", out / "results" / "aligned"
    tasks = list(comparison["columns"])
    sections = [
        Section(
            "The mini world",
            [
                Paragraph(
                    "Scenes of real handwritten digits stand in for photographs: a digit lies in "
                    "one cell of a grid, has a colour, and its neighbours do too. A tiny CLIP "
                    "learned from captions that name digits but never colours, places or sizes; "
                    "a tiny vision-centric teacher sees all of these and knows no text; a tiny "
                    "LLaVA was trained on the original CLIP tower. All three are real "
                    "transformers classes, only small."
                ),
                Figure(
                    sheet,
                    alt="A sheet of scenes with coloured digits, a caption below each",
                    caption="Pictures that the models have never seen, with captions.",
                ),
            ],
        ),
        alignment_section(out / "align"),
        Section(
            "The tower by itself",
            [
                Paragraph(
                    "Measured on scans that no model was trained on. Zero-shot and retrieval use "
                    "the text tower of the original CLIP, which was not touched. One run on one "
                    "seed: `kuea-mllm world study` measures the spread."
                ),
                encoder_table(encoder["original"], encoder["aligned"]),
            ],
        ),
        *comparison_sections(
            comparison, examples=pick_examples(original, candidate, tasks, per_kind=4)
        ),
        *([] if lora is None else [peft_section(lora)]),
        *([] if flamingo is None else [shots_section(flamingo)]),
        Section(
            "Is the aligned tower really in use?",
            [
                Paragraph(
                    "A fingerprint is a hash of all weights of the tower. It was computed again "
                    "from the files of the swapped model, and by lmms-eval's model class from "
                    "the weights in memory."
                ),
                KeyValues(
                    [
                        ("Tower inside LLaVA before", receipt.fingerprint_before),
                        ("Tower inside LLaVA now", receipt.fingerprint_after),
                        (
                            "Tower that answered",
                            comparison["candidate"]["model"]["tower_fingerprint"],
                        ),
                        ("Tensors replaced", str(receipt.tensors_replaced)),
                        ("Files rewritten", ", ".join(receipt.files_rewritten)),
                    ]
                ),
            ],
        ),
        Section(
            "What to try next",
            [
                Bullets(
                    [
                        "Look at one run's settings: align/run.yaml, or `kuea-mllm recipes show "
                        "align/miniworld`.",
                        "Drop the preservation term and watch the drift: the command below.",
                        "Measure the spread over several worlds: `kuea-mllm world study`, and with "
                        "LoRA `kuea-mllm world peft`.",
                        "Use your own tower and images: `kuea-mllm align --help`.",
                    ]
                ),
                Code(
                    f"kuea-mllm align -r align/miniworld --student {ASSETS / 'clip'} "
                    f"--teacher {ASSETS / 'teacher'} --images {out / 'images'} "
                    f"--heldout {out / 'heldout'} --set objective.preserve_weight=0 "
                    "--out no-preservation"
                ),
            ],
        ),
    ]
    summary = comparison_summary(parse_comparison(comparison))
    summary.append(
        Paragraph(
            "The columns compare one LLaVA with its original tower to the same LLaVA with the "
            "aligned tower; nothing else was changed or trained. The objective holds the pooled "
            "embedding near its original, but this LLaVA reads patch tokens, which it does not "
            "constrain."
        )
    )
    gap = aligned.after["heldout_kernel_gap"] / aligned.before["heldout_kernel_gap"]
    summary.append(
        Paragraph(
            f"On held-out pictures the kernel gap to the teacher fell to {100 * gap:.0f} % of what "
            "it was; zero-shot accuracy of the tower went from "
            f"{encoder['original']['zero_shot/average']:.1f} to "
            f"{encoder['aligned']['zero_shot/average']:.1f} %."
        )
    )
    write_quickstart_report(
        out / "report.html",
        title="kuea-mllm quickstart",
        subtitle="Align a CLIP tower, swap it into LLaVA, measure the difference",
        summary=summary,
        sections=sections,
        provenance=[
            *library_versions().items(),
            ("seconds", f"{seconds:.0f}"),
            ("mini world", str(read_json(ASSETS / "world.json").get("seed"))),
        ],
    )


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    # Not `atomic_directory`: the parts of a quickstart name each other by path, and a renamed
    # folder would leave those names pointing nowhere.
    with disk_errors_named(directory):
        directory.mkdir(parents=True)
        try:
            yield
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
