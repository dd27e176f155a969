"""What a calibration shows: sentences, terminal table, curve, lines to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
# What the kernel becomes at either end, in words.
_LIMITS = {
    "polynomial": ("every pair equally similar", "the cosine to the power of {degree}"),
    "gaussian": ("every image like itself only", "every pair equally similar"),
}
# Quarters that disagree by more than this leave the first digit open.
_STEADY = 1.25


def finding(record: Record) -> str:
    """Say in a few sentences what was found and how far it can be trusted."""
    name, value = record["parameter"], f"{record['value']:.4g}"
    low, high = record["near"]
    zero, infinity = _limit_texts(record)
    sentences = {
        "interior": f"The best fit is at {name} = {value}, a minimum inside the range; anything "
        f"from {_number(low)} to {_number(high)} fits about as well.",
        "infinity": f"There is no minimum inside the range: everything from {name} = {value} all "
        f"the way to {name} -> infinity ({infinity}) fits about as well as the best. The smallest "
        "of these is chosen.",
        "zero": f"There is no minimum inside the range: everything from {name} = {value} all the "
        f"way to {name} -> 0 ({zero}) fits about as well as the best. The largest of these is "
        "chosen.",
        "flat": f"The curve is flat: these embeddings do not tell one {name} from another. "
        f"{name} = {value} only follows from their size.",
    }
    told = [sentences[record["optimum"]]]
    if record["spread"] > _STEADY:
        told.append(
            f"Quarters of the images disagree by a factor of {record['spread']:.3g}: take more "
            "images (--count) if the exact value matters."
        )
    if record["explained"] <= 0:
        told.append(
            "Whatever the constants, the untouched student's kernel is further from the teacher's "
            "than one constant number would be: constants set the level, training has to do the "
            "rest."
        )
    if record["kernel"] == "polynomial":
        told.append(
            "Only rho = gamma / coef0 matters; the scale of the pair is set by "
            "gamma * mean |x|^2 + coef0 = 1."
        )
    return " ".join(told)


def recipe_fragment(record: Record) -> str:
    """Return the student's kernel as YAML to paste into a recipe."""
    return yaml.safe_dump({"objective": {"student_kernel": _kernel(record)}}, sort_keys=False)


def override_options(record: Record) -> str:
    """Return the same as options for `kuea-mllm align`, quoted for a shell."""
    kernel, present = _kernel(record), record["recipe_kernel"]
    path = "objective.student_kernel"
    if present["type"] != kernel["type"]:
        text = yaml.safe_dump(kernel, sort_keys=False, default_flow_style=True, width=1000)
        return f"--set {shlex.quote(f'{path}={text.strip()}')}"
    changed = {key: value for key, value in kernel.items() if present.get(key) != value}
    return " ".join(f"--set {path}.{key}={_yaml_scalar(value)}" for key, value in changed.items())


def print_calibration(record: Record, directory: str | None) -> None:
    """Print table, sentences and lines to paste."""
    from rich.console import Console

    from kuea_mllm.reporting.tables import key_values

    console = Console()
    title = f"{record['kernel']} kernel, {record['count']} images"
    console.print(key_values(title, _rows(record)))
    console.print(finding(record), highlight=False)
    # Not by rich: a line that it wraps can no longer be pasted.
    lines = ["", recipe_fragment(record), "or, for kuea-mllm align:", override_options(record)]
    if directory is not None:
        lines += ["", f"written: {directory}/calibration.json, curve.png, student_kernel.yaml"]
    console.file.write("\n".join(lines) + "\n")


def calibration_curve(record: Record) -> Figure:
    """Draw the gap over rho or sigma, with the choice and everything it is measured against."""
    from matplotlib.figure import Figure

    from kuea_mllm.reporting.drawing import BLUE, drawing_style, set_log_scale

    values = [value for value, _ in record["curve"]]
    losses = [loss for _, loss in record["curve"]]
    with drawing_style():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        # Plain powers: the formatter that matplotlib would choose writes TeX, which is off.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
        low, high = record["near"]
        axes.axvspan(low or values[0], high or values[-1], color=BLUE, alpha=0.1, linewidth=0)
        axes.plot(values, losses, color=BLUE, linewidth=1.8, label="untouched student")
        _draw_references(axes, record)
        _draw_choices(axes, record)
        if min(losses) > 0 and max(losses) / min(losses) > 20:
            set_log_scale(axes)
        axes.set_xlim(values[0], values[-1])
        axes.set_xlabel(
            "rho = gamma / coef0" if record["parameter"] == "rho" else "bandwidth sigma"
        )
        axes.set_ylabel("mean squared gap\nto the teacher's kernel")
        figure.legend(loc="outside upper left", ncols=2, handlelength=2.4)
    return figure


def _draw_references(axes: Axes, record: Record) -> None:
    from kuea_mllm.reporting.drawing import GREEN, GREY

    zero, infinity = record["limits"]["zero"], record["limits"]["infinity"]
    # The better end; the other one is every pair alike, or none, which nobody is after.
    at_infinity = infinity <= zero
    axes.axhline(
        infinity if at_infinity else zero,
        color=GREY,
        linestyle="--",
        linewidth=1.2,
        label=f"limit {record['parameter']} → {'∞' if at_infinity else '0'}",
    )
    axes.axhline(
        record["target_variance"],
        color=GREEN,
        linestyle=":",
        linewidth=1.6,
        label="best constant prediction",
    )


def _draw_choices(axes: Axes, record: Record) -> None:
    from kuea_mllm.reporting.drawing import GREY, ORANGE, PURPLE

    name = record["parameter"]
    if record["compared"] is not None:
        value, loss = record["compared"]
        axes.plot(
            [value], [loss], "s", color=PURPLE, markersize=7, label=f"recipe, {name} = {value:.3g}"
        )
    for number, quarter in enumerate(record["quarters"]):
        axes.plot(
            [quarter["value"]],
            [0.02],
            "|",
            color=GREY,
            markersize=11,
            transform=axes.get_xaxis_transform(),
            label="choice of each quarter" if number == 0 else None,
        )
    axes.plot(
        [record["value"]],
        [record["loss"]],
        "o",
        color=ORANGE,
        markersize=8,
        label=f"chosen, {name} = {record['value']:.3g}",
    )


def _rows(record: Record) -> list[tuple[str, object]]:
    name = record["parameter"]
    zero, infinity = _limit_texts(record)
    low, high = record["near"]
    where = {"interior": "inside the range", "flat": "nowhere: the curve is flat"}.get(
        record["optimum"], f"towards {record['optimum']}: no minimum inside"
    )
    rows: list[tuple[str, object]] = [(f"chosen {name}", f"{record['value']:.6g}")]
    if name == "rho":
        pair = record["constants"]
        rows.append(("as a pair", f"gamma {pair['gamma']:.6g}, coef0 {pair['coef0']:.6g}"))
    rows += [
        ("optimum", where),
        ("about as good (1 %)", f"{name} from {_number(low)} to {_number(high)}"),
        (
            f"{name} by quarters",
            ", ".join(f"{quarter['value']:.3g}" for quarter in record["quarters"]),
        ),
        ("mean squared gap, chosen", f"{record['loss']:.4g}"),
    ]
    if record["compared"] is not None:
        value, loss = record["compared"]
        rows.append((f"  recipe now, {name} = {value:.4g}", f"{loss:.4g}"))
    rows += [
        (f"  {name} -> 0", f"{record['limits']['zero']:.4g}  ({zero})"),
        (f"  {name} -> infinity", f"{record['limits']['infinity']:.4g}  ({infinity})"),
        ("  best constant prediction", f"{record['target_variance']:.4g}  (teacher's variance)"),
        ("share explained (R2)", f"{record['explained']:.3f}"),
        ("correlation of the kernels", f"{record['correlation']:.3f}"),
        (
            "mean similarity",
            f"student {record['mean_student']:.3f}, teacher {record['mean_teacher']:.3f}",
        ),
        (
            "mean |x|^2",
            f"{record['unit']:.4g}  (rho times it: {record['value'] * record['unit']:.4g})",
        )
        if name == "rho"
        else (
            "median distance",
            f"{record['unit']:.4g}  (sigma is {record['value'] / record['unit']:.3g} of it)",
        ),
    ]
    return rows


def _limit_texts(record: Record) -> tuple[str, str]:
    zero, infinity = _LIMITS[record["kernel"]]
    return zero, infinity.format(degree=record["degree"])


def _kernel(record: Record) -> dict[str, Any]:
    kernel: dict[str, Any] = {"type": record["kernel"]}
    if record["degree"] is not None:
        kernel["degree"] = record["degree"]
    # Six digits are three more than any set of images determines.
    return kernel | {name: float(f"{value:.6g}") for name, value in record["constants"].items()}


def _yaml_scalar(value: object) -> str:
    return yaml.safe_dump(value).partition("\n")[0]


def _number(value: float | None) -> str:
    return "the limit" if value is None else f"{value:.4g}"
