"""What each logged number of an alignment run means, when it is healthy, and what to do if not.

The same list stands in every run's report and in `docs/stability.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Measured = Mapping[str, float]
Check = Callable[[Measured, Measured], bool]


@dataclass(frozen=True)
class Gauge:
    """One logged number.

    Args:
        metric: Its key in `metrics.jsonl`; several are separated by commas.
        name: What a report calls it.
        meaning: What it is, in plain words.
        healthy: How it looks in a run that goes well.
        causes: What is likely wrong if it does not, and what to try.
        check: Whether it is healthy, given the first and the last measurement; None where only a
            look at the curve can tell.
    """

    metric: str
    name: str
    meaning: str
    healthy: str
    causes: str
    check: Check | None = None


# Where the mini world is named, docs/miniworld.md holds the measurement; every other number is a
# rule of thumb, and marked as one in the text.
GAUGES = (
    Gauge(
        "heldout_kernel_gap, heldout_kernel_gap_original",
        "kernel gap to the teacher",
        "Mean squared difference of the kernel matrices of tower and teacher on held-out images; "
        "for the trained tower, and for the untouched one under the same kernel.",
        "Falls, and ends below the untouched tower under the same kernel.",
        "Both fall together: only the kernel constants moved; keep them fixed or lower "
        "optim.kernel_lr. Training gap falls, held-out does not: too few or too uniform images.",
        lambda first, last: last["heldout_kernel_gap"] < last["heldout_kernel_gap_original"],
    ),
    Gauge(
        "heldout_cka_teacher",
        "linear CKA with the teacher",
        "Likeness of the two representations up to rotation and scale, from 0 to 1; no kernel "
        "constant enters.",
        "Ends no more than 0.01 below its start (rule of thumb).",
        "Falls for good: the tower loses structure instead of gaining the teacher's; lower "
        "optim.lr or the weights, or calibrate the kernel. High from the start with few images: "
        "CKA is biased upwards below a few hundred.",
        lambda first, last: last["heldout_cka_teacher"] >= first["heldout_cka_teacher"] - 0.01,
    ),
    Gauge(
        "heldout_drift_cosine_mean",
        "cosine to the original embedding",
        "How far the direction of the pooled embedding turned; 1 is not at all.",
        "Above 0.8 at the end (rule of thumb; the mini world's recipe ends near 0.92, and near "
        "0.53 without preservation).",
        "Too low: objective.kernel_weight is too large against objective.preserve_weight, or "
        "optim.lr is too high. Stays at 1.000: the weight is too small to move anything.",
        lambda first, last: last["heldout_drift_cosine_mean"] >= 0.8,
    ),
    Gauge(
        "heldout_drift_bound_mean",
        "bound on the change of image-text cosines",
        "Proposition 3.2: no cosine of an image with any text can have changed by more than this.",
        "Below 2, or it says nothing: two cosines never differ by more. Real changes are far "
        "smaller than the bound.",
        "As for the cosine. monitor.early_stop.max_drift_bound ends a run that exceeds a limit.",
        lambda first, last: last["heldout_drift_bound_mean"] < 2,
    ),
    Gauge(
        "heldout_patch_drift",
        "relative drift of the patch tokens",
        "Length of the change of the patch tokens over their own length, at the hidden state that "
        "an MLLM reads. The proposition does not bound it.",
        "At most 0.05 left a frozen LLaVA of the mini world as it was; 0.09 cost it 1.7 points, "
        "0.11 cost 8.8. For full-size models no such number is known.",
        "Too high: set objective.patch_preserve_weight, or tune the MLLM after the swap.",
        lambda first, last: last["heldout_patch_drift"] <= 0.05,
    ),
    Gauge(
        "heldout_zero_shot",
        "zero-shot accuracy",
        "Share of labelled images whose class name is the nearest text, from 0 to 1.",
        "Ends no more than 0.05 below its start (rule of thumb).",
        "Falls: the tower leaves its text tower's space, which the mean cosine can hide; raise "
        "objective.preserve_weight, or start from kernel constants nearer to the teacher's.",
        lambda first, last: last["heldout_zero_shot"] >= first["heldout_zero_shot"] - 0.05,
    ),
    Gauge(
        "loss_kernel",
        "kernel gap of the training batches",
        "As the held-out gap, on the images that are trained on; rows are means since the last.",
        "Falls fast during and after warm-up, then slowly.",
        "Flat from the start: weight or rate too small, or unfit kernel constants (calibrate). "
        "Rises or swings: optim.lr too high, optim.warmup_steps too few, batch too small.",
    ),
    Gauge(
        "loss_preserve",
        "preservation",
        "Mean squared distance to the original embedding, summed over the width.",
        "Exactly 0 at step 1, rises through warm-up, then levels off.",
        "Not 0 at step 1: student and original are not the same tower. Keeps rising: the kernel "
        "term outweighs it.",
    ),
    Gauge(
        "kernel_rho, kernel_sigma",
        "constants of the student's kernel",
        "The only number that a polynomial kernel depends on, gamma / coef0; the bandwidth of a "
        "Gaussian one. Flat if fixed.",
        "Changes slowly and smoothly.",
        "Runs away upwards: the kernel turns into a plain power of the cosine. Towards zero: all "
        "images become alike. Lower optim.kernel_lr, calibrate, or fix the constants.",
    ),
    Gauge(
        "grad_norm",
        "gradient norm",
        "Length of the gradient of all trained parameters, before clipping.",
        "Highest at the start, then lower and without spikes of ten times its usual size (rule of "
        "thumb).",
        "Spikes: optim.lr too high or odd images; set optim.max_grad_norm. Not finite: use "
        "runtime.precision=fp32 and lower the rate.",
    ),
    Gauge(
        "lr",
        "learning rate",
        "Rate of the last update.",
        "A line up during warm-up, then half a cosine down to 0.",
        "A high first point under compat=released is on purpose: the released loop runs update 1 "
        "at the full rate.",
    ),
    Gauge(
        "images_per_second, mfu",
        "speed, share of the peak FLOP/s",
        "Images trained on per second without held-out measurements; the share of what the devices "
        "could do, where their peak is known.",
        "Level after the first row, which includes start-up and compilation.",
        "Sinks or swings: decoding is too slow (data.workers, a pack, targets.cache) or others use "
        "the machine. Low but level: a batch too small for the device, or fp32 where bf16 would "
        "do.",
    ),
)


def measured_gauges(first: Measured) -> list[Gauge]:
    """Return the gauges of the held-out measurements that a run made."""
    return [gauge for gauge in GAUGES if gauge.metric.split(",")[0] in first]


def stability_markdown() -> str:
    """Return `docs/stability.md`."""
    lines = [
        "# Is this run healthy?",
        "",
        "Every number that `kuea-mllm align` logs, how it looks in a run that goes well, and what "
        "is likely wrong if it does",
        "not. `report.html` in the run's folder checks the held-out ones and shows all curves.",
        "Where the mini world is named, `miniworld.md` holds the measurement; other limits are "
        "rules of thumb (estimates), not",
        "measurements.",
        "",
        "| metric | what it is | healthy | if not |",
        "|---|---|---|---|",
    ]
    for gauge in GAUGES:
        keys = ", ".join(f"`{key.strip()}`" for key in gauge.metric.split(","))
        lines.append(f"| {keys} | {gauge.meaning} | {gauge.healthy} | {gauge.causes} |")
    lines += [
        "",
        "A run whose loss, held-out measurement or kernel constant is not finite ends by itself; "
        "the message names the first",
        "term, update and images, and the last good checkpoint. `monitor.early_stop` ends one that "
        "no longer improves.",
        "",
    ]
    return "\n".join(lines)
