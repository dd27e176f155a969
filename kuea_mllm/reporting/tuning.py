"""What a tuning shows: terminal lines, figures, its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuea_mllm.io import read_json
from kuea_mllm.reporting.alignment import read_metrics
from kuea_mllm.reporting.blocks import (
    Block,
    Code,
    Figure,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
)
from kuea_mllm.reporting.pages import quickstart_report
from kuea_mllm.reporting.run_record import resumed_note, versions_text
from kuea_mllm.reporting.text import count, plural

# File name -> what it shows, what to look at.
_FIGURES = {
    "loss": (
        "Loss over the updates of the run",
        "Mean cross-entropy of the predicted tokens, of the updates since the row before. Updates "
        "differ in what they hold (short answers, long ones, text alone), so points jump.",
    ),
    "training": (
        "Learning rate, gradient norm and speed over the updates",
        "The course of training. The first rate includes the start of the workers.",
    ),
}


def print_tuning_result(result: Mapping[str, Any]) -> None:
    """Print what a finished run wrote, and what to do with it."""
    from rich.console import Console

    from kuea_mllm.reporting.tables import key_values

    data = result["data"]
    items = [
        ("updates", count(result["steps"])),
        ("trained parameters", count(result["trainable_parameters"])),
        ("vision tower, unchanged", result["tower_fingerprint"][:16]),
        ("samples seen", count(data["samples"])),
        ("of them cut", _cut(data)),
        ("seconds", f"{result['seconds']:.0f}"),
    ]
    if data["unlabelled_samples"]:
        items.insert(5, ("nothing learned from", plural(data["unlabelled_samples"], "sample")))
    if result["merged"]:
        items.append(("merged model", result["merged"]))
    else:
        items.append(("next", f"kuea-mllm merge {result['adapter']} OUT"))
    Console().print(key_values(f"LoRA weights: {result['adapter']}", items))


def draw_tuning_figures(directory: Path) -> None:
    """Write `figures/` and `report.html` of a run that is complete but for them."""
    from kuea_mllm.reporting import alignment_figures as draw
    from kuea_mllm.reporting.drawing import figure_svg, save_figure
    from kuea_mllm.reporting.html import write_report

    rows = read_metrics(directory)
    drawings = {"loss": draw.loss_terms(rows), "training": draw.training_course(rows)}
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    blocks = []
    for name, drawing in drawings.items():
        save_figure(drawing, figures / f"{name}.png")
        alt, caption = _FIGURES[name]
        blocks.append(Figure(figure_svg(drawing, name), alt=alt, caption=caption))
    write_report(directory / "report.html", tuning_report(directory, blocks))


def tuning_report(directory: Path, figures: Sequence[Figure] = ()) -> Report:
    """Build the report of a run from its `kuea.json` and `metrics.jsonl`."""
    manifest, rows = read_json(directory / "adapter" / "kuea.json"), read_metrics(directory)
    return quickstart_report(
        title="LoRA tuning",
        subtitle=f"Base: {manifest['base']['reference']}. Data: {manifest['data']['file']}.",
        summary=_summary(manifest, rows),
        sections=[
            Section("What was done", [KeyValues(_settings(manifest))]),
            Section("What trained, and what did not", [_receipt(manifest["trained"])]),
            *([Section("Figures", figures)] if figures else []),
            Section("Using it", _use(manifest)),
        ],
        provenance=_provenance(manifest),
    )


def _summary(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    losses = [row["loss"] for row in rows if "loss" in row]
    blocks: list[Block] = [
        Paragraph(
            f"{plural(manifest['steps'], 'update')} on {count(manifest['data']['samples'])} "
            f"samples; the loss went from {losses[0]:.3g} to {losses[-1]:.3g}. The vision tower is "
            "the same before and after.",
            "lead",
        )
    ]
    data = manifest["data"]
    if data["truncated_samples"]:
        blocks.append(Paragraph(f"Cut to {data['max_length']} tokens: {_cut(data)}.", "note"))
    if data["unlabelled_samples"]:
        blocks.append(
            Paragraph(
                f"Nothing was learned from {plural(data['unlabelled_samples'], 'sample')}: their "
                "answers were cut off, or cannot be told from the questions. run.log names the "
                "first.",
                "warning",
            )
        )
    blocks += resumed_note(manifest, "update")
    return blocks


def _cut(data: Mapping[str, Any]) -> str:
    cut, samples = data["truncated_samples"], data["samples"]
    if not cut:
        return "none"
    return f"{count(cut)} of {count(samples)} samples, {count(data['tokens_left_out'])} tokens"


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora, optim, runtime = manifest["lora"], manifest["optim"], manifest["runtime"]
    clip = optim["max_grad_norm"]
    weighting = (
        "each predicted token of an update weighs the same"
        if optim["loss_weighting"] == "token"
        else "each micro-batch of an update weighs the same"
    )
    return [
        ("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"),
        ("Projector", "trained" if lora["projector"] == "train" else "frozen"),
        ("Frozen weights", _frozen(manifest["quantization"], runtime["dtype"])),
        ("Learning rates", f"{optim['lr']:g}; projector {optim['projector_lr']:g}"),
        ("Samples of an update", f"{count(optim['batch_size'])}, {weighting}"),
        ("Gradient clipping", f"norm {clip:g}" if clip else "none"),
        ("Follows", "the paper" if manifest["compat"] == "paper" else "the released code"),
        ("Processes", str(manifest["processes"])),
        ("Training time", f"{manifest['seconds']:.0f} s"),
    ]


def _frozen(quantization: str, dtype: str) -> str:
    return dtype if quantization == "none" else f"language model in {quantization}, rest {dtype}"


def _receipt(trained: Mapping[str, Any]) -> Table:
    return Table(
        caption="Every tensor of the model belongs to one of these groups.",
        header=("Group", "Trained", "Layers", "Tensors", "Parameters", "Held in"),
        rows=[
            (
                group["name"],
                "yes" if group["trains"] else "no",
                count(group["modules"]),
                count(group["tensors"]),
                count(group["parameters"]),
                ", ".join(group["dtypes"]),
            )
            for group in trained["groups"]
        ],
        numeric=frozenset({2, 3, 4}),
    )


def _use(manifest: Mapping[str, Any]) -> list[Block]:
    return [
        Paragraph("A plain model directory, for any library that loads the base:"),
        Code("kuea-mllm merge adapter MERGED"),
        Paragraph(
            "Or with PEFT, on top of the base: PeftModel.from_pretrained(model, 'adapter'); the "
            "directory holds the projector too, where it was trained."
        ),
    ]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = ("kuea-mllm", "torch", "transformers", "peft", "python")
    return [
        ("Command", manifest["command"]),
        ("Finished", manifest["created"]),
        ("Vision tower", manifest["vision_tower"]["fingerprint"]),
        ("Data file (checksum)", manifest["data"]["listing"]),
        ("Versions", versions_text(manifest, *shown)),
        ("All settings", "run.yaml beside this file repeats the run"),
    ]
