"""`kuea-mllm`: assembles the verbs."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from kuea_mllm import __version__
from kuea_mllm.cli import (
    align,
    cache,
    calibrate,
    compare,
    convert,
    doctor,
    evaluate,
    judge,
    look,
    lora,
    merge,
    pack,
    plan,
    probe,
    push,
    quickstart,
    recipes,
    swap,
    sweep,
    verify,
    world,
)
from kuea_mllm.errors import Terminated
from kuea_mllm.launch import has_parent

app = typer.Typer(
    name="kuea-mllm",
    help="Align a CLIP vision tower with KUEA, swap it into a multimodal LLM, and measure what "
    "that changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: panels would load rich, half of the time that `--help` takes.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for name, function, summary in (
    ("quickstart", quickstart.quickstart, "See the whole method on a tiny world, in minutes."),
    ("doctor", doctor.doctor, "Check this installation, or a folder of images."),
    ("plan", plan.plan, "Memory, hours and disk of an alignment, without running it."),
    ("calibrate", calibrate.calibrate, "Choose kernel constants from a few hundred images."),
    ("pack", pack.pack, "Decode and crop images once, for faster training."),
    ("align", align.align, "Align a CLIP tower with a vision teacher."),
    ("sweep", sweep.sweep, "Align at every combination of some settings."),
    ("probe", probe.probe, "Score a tower by itself: zero-shot, retrieval, probes, MMVP-VLM."),
    ("swap", swap.swap, "Put an aligned tower into a multimodal LLM."),
    ("lora", lora.lora, "Tune a multimodal LLM with LoRA; its tower stays as it is."),
    ("merge", merge.merge, "Write LoRA weights and their base as one plain model."),
    ("verify", verify.verify, "Say which tower is in a model, and prove it."),
    ("eval", evaluate.evaluate, "Score a multimodal LLM with lmms-eval."),
    ("judge", judge.judge, "Grade the answers of an evaluation by a language model."),
    ("compare", compare.compare, "Compare two evaluations, question by question."),
    ("look", look.look, "See what an alignment changed inside a tower."),
    ("convert", convert.convert, "Convert a tower between file formats."),
    ("push", push.push, "Upload a tower, model or LoRA weights to the Hugging Face Hub."),
):
    app.command(name, short_help=summary)(function)
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")
app.add_typer(world.app, name="world", short_help="Build and study the mini world.")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kuea-mllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug lines.", is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only warnings and results.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options that come before the verb."""
    # Environment variables, so that verbs and worker processes see the same switches.
    if debug:
        os.environ["KUEA_MLLM_DEBUG"] = "1"
    if quiet:
        os.environ["KUEA_MLLM_QUIET"] = "1"


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Same way out as Ctrl-C, so that half-written directories are removed.
    raise Terminated


def run() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    if has_parent():
        # For the run record and for messages: the command as it was typed.
        sys.argv[0] = "kuea-mllm"
    app(prog_name="kuea-mllm")


if __name__ == "__main__":
    run()
