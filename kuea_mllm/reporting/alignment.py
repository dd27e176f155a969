"""What an alignment run shows: terminal lines, figures, its report, a section of other reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.io import read_json
from kuea_mllm.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Details,
    Figure,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
)
from kuea_mllm.reporting.pages import quickstart_report
from kuea_mllm.reporting.run_record import resumed_note, versions_text
from kuea_mllm.reporting.stability import GAUGES, measured_gauges
from kuea_mllm.reporting.text import count, plural, value_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_MEASURED = {
    "heldout_kernel_gap": "kernel gap to the teacher",
    "heldout_kernel_gap_original": "the same, original tower under the present kernel",
    "heldout_cka_teacher": "linear CKA with the teacher",
    "heldout_drift_cosine_mean": "cosine to the original embedding, mean",
    "heldout_drift_distance_mean": "distance to the original embedding, mean",
    "heldout_drift_bound_mean": "bound on the drift of image-text cosines (Proposition 3.2), mean",
    "heldout_patch_drift": "relative drift of the patch tokens",
    "heldout_zero_shot": "zero-shot accuracy",
}
_MEANINGS = {
    "heldout_kernel_gap_original": "What the row above has to beat: it moves with the kernel's "
    "constants alone.",
    "heldout_drift_distance_mean": "In units of the embedding, so without a range of its own.",
}
# File name -> what it shows, what to look at; in the order of the report.
_FIGURES = {
    "heldout_gap": (
        "Nearness to the teacher on held-out images over the steps",
        "Held-out images. What counts is the distance between the two lines of the gap: a change "
        "of the kernel constants moves both.",
    ),
    "drift": (
        "Drift from the original tower on held-out images over the steps",
        "Distance from the original tower on held-out images. What was trained on the original, a "
        "text tower or an MLLM, expects embeddings and tokens near its own.",
    ),
    "kernel_matrices": (
        "Kernel matrices of the original tower, the aligned tower and the teacher",
        "Kernel matrices of the same held-out pictures, one colour scale.",
    ),
    "kernel_differences": (
        "Differences of the kernel matrices",
        "What separates each tower from the teacher, and what training changed. Red pairs are more "
        "alike in the first matrix than in the second, blue ones less.",
    ),
    "attention": (
        "Attention over pictures before and after alignment",
        "Where the tower looks, before and after: brighter is more, one scale for each picture.",
    ),
    "loss": (
        "Loss terms over the steps of the run",
        "Loss on the training batches: the weighted total, and each term before weighting.",
    ),
    "kernel_parameters": (
        "Constants of the student's kernel over the steps",
        "Constants of the student's kernel. A polynomial kernel depends on rho alone.",
    ),
    "training": (
        "Learning rate, gradient norm and speed over the steps",
        "The course of training. The first rate includes the start of the workers and, with "
        "torch.compile, the compilation.",
    ),
}
_WEIGHTS = {
    "kernel_weight": "kernel gap",
    "feature_weight": "feature gap",
    "cka_weight": "1 - CKA",
    "distill_weight": "distillation",
    "preserve_weight": "preservation",
    "patch_preserve_weight": "patch preservation",
    "patch_kernel_weight": "patch kernel gap",
    "patch_distill_weight": "patch distillation",
}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_alignment_figures(directory: Path) -> None:
    """Write `figures/` and `report.html` of a run that is complete but for them."""
    from kuea_mllm.reporting.drawing import save_figure
    from kuea_mllm.reporting.html import write_report

    drawings = _draw(directory)
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        save_figure(drawing, figures / f"{name}.png")
    blocks = [_figure(name, drawing) for name, drawing in drawings.items()]
    write_report(directory / "report.html", alignment_report(directory, blocks))


def alignment_report(directory: Path, figures: Sequence[Figure] = ()) -> Report:
    """Build the report of a run from its `kuea.json` and `metrics.jsonl`."""
    manifest, rows = read_json(directory / "tower" / "kuea.json"), read_metrics(directory)
    measured = manifest["heldout"]
    return quickstart_report(
        title="Alignment run",
        subtitle=f"Student: {manifest['base_tower']['reference']}. "
        f"Teacher: {manifest['teacher']['reference']}.",
        summary=_summary(manifest, rows),
        sections=[
            Section("What was done", [KeyValues(_settings(manifest, rows))]),
            Section(
                "Before and after",
                [
                    _before_and_after(measured),
                    Paragraph(
                        "“Out of range” is a reason to look, not a verdict: the ranges are rules "
                        "of thumb.",
                        "note",
                    ),
                ],
            ),
            *([Section("Figures", figures)] if figures else []),
            Section("Is this run healthy?", _health_list()),
        ],
        provenance=_provenance(manifest),
    )


def print_alignment_result(
    directory: str, *, before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> None:
    """Print what a finished run measured."""
    from rich.console import Console

    from kuea_mllm.reporting.tables import key_values

    items = [
        (text, f"{before[name]:.4g} -> {after[name]:.4g}")
        for name, text in _MEASURED.items()
        if name in before and name in after
    ]
    title = f"aligned tower: {directory}/tower"
    Console().print(key_values(title, [*items, ("seconds", f"{seconds:.0f}")]))


def alignment_section(directory: Path) -> Section:
    """Return the section of another report that tells about one alignment run."""
    drawings = _draw(directory, ("kernel_matrices", "loss"))
    images = read_json(directory / "tower" / "kuea.json")["heldout"]["images"]
    measured = [row for row in read_metrics(directory) if "heldout_kernel_gap" in row]
    first, last = measured[0], measured[-1]
    table = Table(
        caption=f"Before and after, on {count(images)} images that were not trained on.",
        header=("Quantity", "Before", "After"),
        rows=[
            (text, f"{first[name]:.4g}", f"{last[name]:.4g}")
            for name, text in _MEASURED.items()
            if name in first and name in last
        ],
        numeric=frozenset({1, 2}),
    )
    return Section(
        "Alignment",
        [
            Paragraph(
                "Each matrix compares every picture with every other. Training moves the tower's "
                "matrix towards the teacher's, while the preservation term keeps every embedding "
                "near its original, so that text and LLM still understand it."
            ),
            *(_figure(name, drawing) for name, drawing in drawings.items()),
            table,
        ],
    )


def _draw(directory: Path, wanted: Sequence[str] = tuple(_FIGURES)) -> dict[str, Drawing]:
    """Return the wanted figures that the run has the numbers for."""
    import numpy as np

    from kuea_mllm.reporting import alignment_figures as draw
    from kuea_mllm.reporting.figures import kernel_matrices

    rows = read_metrics(directory)
    logged = {key for row in rows for key in row}
    found: dict[str, Drawing] = {}
    if "heldout_kernel_gap" in logged:
        found |= {"heldout_gap": draw.heldout_gap(rows), "drift": draw.drift(rows)}
    if (path := directory / "kernel_matrices.json").exists():
        matrices = read_json(path)
        found["kernel_matrices"] = kernel_matrices(matrices)
        found["kernel_differences"] = draw.kernel_differences(matrices)
    if (path := directory / "attention.npz").exists():
        with np.load(path, allow_pickle=False) as maps:
            found["attention"] = draw.attention_maps(
                maps["images"], maps["original"], maps["aligned"]
            )
    if "loss" in logged:
        found |= {"loss": draw.loss_terms(rows), "training": draw.training_course(rows)}
    if any(key.startswith("kernel_") for key in logged):
        found["kernel_parameters"] = draw.kernel_constants(rows)
    return {name: found[name] for name in wanted if name in found}


def _figure(name: str, drawing: Drawing) -> Figure:
    from kuea_mllm.reporting.drawing import figure_svg

    alt, caption = _FIGURES[name]
    return Figure(figure_svg(drawing, name.replace("_", "-")), alt=alt, caption=caption)


def _summary(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Say what came out, then everything that a reader must not miss."""
    before, after = manifest["heldout"]["before"], manifest["heldout"]["after"]
    gap, reference = after["heldout_kernel_gap"], after["heldout_kernel_gap_original"]
    # Against the untouched tower under the same kernel, so that moved constants earn nothing.
    change = (gap / reference - 1) * 100 if reference else 0.0
    verb = "lower" if change < 0 else "higher"
    blocks: list[Block] = [
        Paragraph(
            f"On held-out images the gap to the teacher's kernel is {abs(change):.0f} % {verb} "
            f"than the original tower's under the same kernel ({gap:.4g} against {reference:.4g}), "
            f"and embeddings keep a mean cosine of {after['heldout_drift_cosine_mean']:.3f} to "
            "the original ones.",
            "lead",
        )
    ]
    if reason := manifest.get("stopped_early"):
        last = max(int(row["step"]) for row in rows)
        planned = manifest["optim"]["steps"]
        blocks.append(
            Paragraph(f"Stopped early at step {last:,} of {planned:,}: {reason}.", "warning")
        )
    blocks += resumed_note(manifest, "step")
    outside = [
        gauge for gauge in measured_gauges(before) if gauge.check and not gauge.check(before, after)
    ]
    if outside:
        blocks.append(Paragraph("Look at these first:", "warning"))
        blocks.append(Bullets([f"{_sentence(gauge.name)}. {gauge.causes}" for gauge in outside]))
    return blocks


def _settings(
    manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    objective, optim, runtime = (manifest[key] for key in ("objective", "optim", "runtime"))
    teachers = [manifest["teacher"], *manifest.get("extra_teachers", [])]
    weights = [
        f"{objective[key]:g} x {label}" for key, label in _WEIGHTS.items() if objective.get(key)
    ]
    done = max((int(row["step"]) for row in rows), default=0)
    items = [
        ("Student", manifest["base_tower"]["reference"]),
        *(
            (
                "Teacher" if index == 0 else f"Teacher {index + 1}",
                f"{teacher['reference']} ({teacher['readout']}, {teacher['image_size']} px)",
            )
            for index, teacher in enumerate(teachers)
        ),
        ("Loss", " + ".join(weights)),
    ]
    if objective.get("kernel_weight"):
        items += [
            ("Student kernel", _kernel(objective["student_kernel"])),
            ("Teacher kernel", _kernel(objective["teacher_kernel"])),
        ]
    data = manifest["data"]
    items += [
        ("Trained on", f"{count(data['trained_on'])} images of {data['images']}"),
        ("Held out", f"{count(manifest['heldout']['images'])} images, {data['heldout']}"),
        ("Updates", f"{done:,} of {optim['steps']:,} planned, {optim['batch_size']} images each"),
        (
            "Rate",
            f"{optim['lr']:g} after {plural(optim['warmup_steps'], 'step')} of warm-up, then "
            f"cosine; weight decay {optim['weight_decay']:g}",
        ),
        ("Precision, device", f"{runtime['precision']} on {runtime['device']}"),
        ("Compatibility", f"{manifest['compat']}, seed {runtime['seed']}"),
    ]
    return items


def _kernel(config: Mapping[str, Any]) -> str:
    if config["type"] == "sum":
        parts = [f"{part['weight']:g} x ({_kernel(part['kernel'])})" for part in config["kernels"]]
        return " + ".join(parts)
    constants = [
        f"{key} {value_text(config[key])}"
        for key in ("degree", "gamma", "coef0", "sigma")
        if config.get(key) is not None
    ]
    if "trainable" in config:
        constants.append("trained" if config["trainable"] else "fixed")
    return f"{config['type']}: {', '.join(constants)}" if constants else str(config["type"])


def _before_and_after(measured: Mapping[str, Any]) -> Table:
    before, after = measured["before"], measured["after"]
    gauges = {gauge.metric.split(",")[0]: gauge for gauge in measured_gauges(before)}
    rows: list[list[str | Cell]] = []
    for key, text in _MEASURED.items():
        if key not in before or key not in after:
            continue
        gauge = gauges.get(key)
        verdict: str | Cell = ""
        if gauge is not None and gauge.check is not None:
            is_healthy = gauge.check(before, after)
            verdict = (
                Cell("✓ in range", "better") if is_healthy else Cell("▲ out of range", "worse")
            )
        rows.append(
            [
                text,
                f"{before[key]:.4g}",
                f"{after[key]:.4g}",
                verdict,
                gauge.healthy if gauge else "",
                gauge.meaning if gauge else _MEANINGS.get(key, ""),
            ]
        )
    return Table(
        caption=f"Before and after, on {count(measured['images'])} images that were not trained "
        "on.",
        header=("Quantity", "Before", "After", "Check", "Healthy", "What it is"),
        rows=rows,
        numeric=frozenset({1, 2}),
    )


def _health_list() -> list[Block]:
    return [
        Paragraph(
            "Every logged number, how it looks in a run that goes well, and what is likely wrong "
            "if it does not. The same list is docs/stability.md."
        ),
        Details(
            "Show the list",
            [
                Table(
                    caption="Numbers in metrics.jsonl.",
                    header=("Metric", "Healthy", "If not"),
                    rows=[(gauge.metric, gauge.healthy, gauge.causes) for gauge in GAUGES],
                )
            ],
        ),
    ]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = ("kuea-mllm", "torch", "transformers", "python")
    return [
        ("Command", manifest["command"]),
        ("Finished", manifest["created"]),
        ("Tower before", manifest["base_tower"]["fingerprint"]),
        ("Tower after", manifest["fingerprint"]),
        ("Teacher", manifest["teacher"]["fingerprint"]),
        ("Listing of images", manifest["data"]["listing"]),
        ("Versions", versions_text(manifest, *shown)),
        ("All settings", "run.yaml beside this file repeats the run"),
    ]


def _sentence(text: str) -> str:
    # str.capitalize would make "cka" of "CKA".
    return text[:1].upper() + text[1:]
