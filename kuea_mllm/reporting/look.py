"""The report of `kuea-mllm look`: attention, kernel matrices, neighbours, moved pairs, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuea_mllm.reporting.blocks import Block, Details, Figure, Paragraph, Report, Section, Table
from kuea_mllm.reporting.pages import quickstart_report
from kuea_mllm.reporting.text import count, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Attention = tuple[NDArray[np.uint8], NDArray[np.floating], NDArray[np.floating]]

_KINDS = {
    "apart": (
        "Pairs that moved apart",
        "Much less alike to the tower than to the one it is compared with. After an alignment "
        "these should be pictures that differ in a detail which the original did not see.",
    ),
    "together": (
        "Pairs that moved together",
        "Much more alike to the tower than to the one it is compared with.",
    ),
    "blind": (
        "Pairs that only the teacher tells apart",
        "Alike to the original and not to the teacher: where there is most to learn. The middle "
        "number says how much of it the tower has learnt.",
    ),
}
_ORDER = ("original", "aligned", "teacher")
_CAPTIONS = {
    "attention": (
        "Attention over pictures under both towers",
        "Attention of the last block's class token (SigLIP: of the pooling head), mean over heads. "
        "Brighter is more; one scale for each picture.",
    ),
    "kernel_matrices": (
        "Kernel matrices of the original tower, the tower and the teacher",
        "Each matrix compares every picture with every other; one colour scale.",
    ),
    "kernel_differences": (
        "Differences of the kernel matrices",
        "What separates each tower from the teacher, and what changed. Red pairs are more alike in "
        "the first matrix than in the second, blue ones less.",
    ),
    "layers": (
        "Linear CKA between all layers of two models",
        "Layer 0 is the input of the first block, i the output of block i. One: equal up to "
        "rotation and scale; zero: unrelated.",
    ),
}


def write_look_report(
    directory: Path,
    record: Mapping[str, Any],
    *,
    matrices: Mapping[str, ArrayLike],
    attention: Attention,
    pairs: Mapping[str, NDArray[np.uint8]],
) -> None:
    """Write `figures/` and `report.html` beside a `look.json`.

    Args:
        directory: Where to.
        record: Content of `look.json`.
        matrices: Kernel matrices by model.
        attention: Images, maps of the original, maps of the tower.
        pairs: Pictures of every list of pairs, (pairs, 2, height, width, 3).
    """
    from kuea_mllm.reporting.drawing import save_figure
    from kuea_mllm.reporting.html import write_report

    drawings = _draw(record, matrices, attention, pairs)
    (directory / "figures").mkdir()
    for name, drawing in drawings.items():
        save_figure(drawing, directory / "figures" / f"{name}.png")
    figures = {name: _block(name, drawing) for name, drawing in drawings.items()}
    write_report(directory / "report.html", look_report(record, figures))


def look_report(record: Mapping[str, Any], figures: Mapping[str, Figure]) -> Report:
    """Build the report of a `look.json` and its figures."""
    teacher = record["teacher"]
    shown = f", teacher {teacher['source']}" if teacher else ""
    return quickstart_report(
        title="What changed in the tower",
        subtitle=f"{record['tower']['source']} against {record['against']['source']}{shown}; "
        f"{count(record['images']['count'])} images of {record['images']['source']}.",
        summary=[Paragraph(text, "lead" if i == 0 else "plain") for i, text in _findings(record)],
        sections=[
            Section("Where it looks", [*_some(figures, "attention"), _attention_table(record)]),
            Section(
                "Which images are neighbours",
                [_neighbour_table(record), _cosine_table(record)],
                [
                    Section(title, [Paragraph(text), *_pair_blocks(record, kind, figures)])
                    for kind, (title, text) in _KINDS.items()
                    if kind in record["pairs"]["moved"]
                ],
            ),
            Section(
                "Kernel matrices",
                [
                    Paragraph(_kernel_text(record)),
                    *_some(figures, "kernel_matrices", "kernel_differences"),
                ],
            ),
            *_layer_sections(record, figures),
        ],
        provenance=_provenance(record),
    )


def print_look(record: Mapping[str, Any], out: str) -> None:
    """Print what was found, in a few lines."""
    from rich.console import Console

    for _, text in _findings(record):
        Console().print(text, highlight=False, markup=False)
    Console().print(f"report: {out}/report.html", highlight=False, markup=False)


def _findings(record: Mapping[str, Any]) -> list[tuple[int, str]]:
    drift, pairs = record["embeddings"]["drift"], record["pairs"]
    k = _favourite(pairs["chance"])
    kept = pairs["neighbours"]["original|aligned"][k]
    texts = [
        f"Embeddings keep a mean cosine of {drift['cosine_mean']:.3f} to those of the original; of "
        f"the {k} nearest neighbours of an image {percent(kept)} % stay."
    ]
    if record["teacher"]:
        before, after = (pairs["neighbours"][f"{name}|teacher"][k] for name in _ORDER[:2])
        texts.append(
            f"With the teacher the tower shares {percent(after)} % of the {k} nearest neighbours, "
            f"the original {percent(before)} % (chance {percent(pairs['chance'][k])} %). Linear "
            f"CKA of the embeddings with the teacher's: "
            f"{record['embeddings']['linear_cka']['original|teacher']:.3f} before, "
            f"{record['embeddings']['linear_cka']['aligned|teacher']:.3f} after."
        )
    return list(enumerate(texts))


def _favourite(chance: Mapping[str, float]) -> str:
    return "10" if "10" in chance else max(chance, key=int)


def _draw(
    record: Mapping[str, Any],
    matrices: Mapping[str, ArrayLike],
    attention: Attention,
    pairs: Mapping[str, NDArray[np.uint8]],
) -> dict[str, Drawing]:
    from kuea_mllm.reporting import alignment_figures, figures, look_figures

    drawn = {
        "attention": alignment_figures.attention_maps(*attention),
        "kernel_matrices": figures.kernel_matrices(matrices),
    }
    if record["teacher"]:
        drawn["kernel_differences"] = alignment_figures.kernel_differences(matrices)
    for kind, pictures in pairs.items():
        titles = [_pair_title(pair["cosine"]) for pair in record["pairs"]["moved"][kind]]
        drawn[f"pairs_{kind}"] = look_figures.picture_pairs(pictures, titles)
    if layers := record["layers"]:
        names = [(str(model), int(layer)) for model, layer in layers["names"]]
        couples = [("aligned", "original")]
        if record["teacher"]:
            couples += [("original", "teacher"), ("aligned", "teacher")]
        drawn["layers"] = look_figures.layer_likeness(names, np.asarray(layers["cka"]), couples)
    return drawn


def _pair_title(cosine: Mapping[str, float]) -> str:
    moved = f"{cosine['original']:.2f} to {cosine['aligned']:.2f}"
    return f"{moved} (teacher {cosine['teacher']:.2f})" if "teacher" in cosine else moved


def _block(name: str, drawing: Drawing) -> Figure:
    from kuea_mllm.reporting.drawing import figure_svg

    if name.startswith("pairs_"):
        alt = _KINDS[name.removeprefix("pairs_")][0]
        caption = "Cosine of the two embeddings: original to tower."
    else:
        alt, caption = _CAPTIONS[name]
    return Figure(figure_svg(drawing, name.replace("_", "-")), alt=alt, caption=caption)


def _some(figures: Mapping[str, Figure], *names: str) -> list[Block]:
    return [figures[name] for name in names if name in figures]


def _attention_table(record: Mapping[str, Any]) -> Table:
    numbers = record["attention"]["numbers"]
    return Table(
        caption=f"Attention over {count(int(numbers['images']))} images. Spread is the entropy of "
        "a map over that of an even one: 1 looks everywhere, 0 at one patch.",
        header=("Quantity", "Value"),
        rows=[
            ("cosine of the maps before and after, mean", f"{numbers['cosine_mean']:.3f}"),
            ("spread, original", f"{numbers['spread_original']:.3f}"),
            ("spread, tower", f"{numbers['spread_aligned']:.3f}"),
        ],
        numeric=frozenset({1}),
    )


def _neighbour_table(record: Mapping[str, Any]) -> Table:
    pairs = record["pairs"]
    ks = list(pairs["chance"])
    rows = [
        (_couple(names), *(percent(by_k[k]) for k in ks))
        for names, by_k in pairs["neighbours"].items()
    ]
    return Table(
        caption="Share of the k nearest neighbours that two models agree on (%), mean over images.",
        header=("Models", *(f"k = {k}" for k in ks)),
        rows=[*rows, ("chance", *(percent(pairs["chance"][k]) for k in ks))],
        numeric=frozenset(range(1, len(ks) + 1)),
        footer=1,
    )


def _cosine_table(record: Mapping[str, Any]) -> Table:
    cka = record["embeddings"]["linear_cka"]
    gap = record["pairs"]["mean_gap"]
    return Table(
        caption="Embeddings of all images. The gap is the mean absolute difference of the cosines "
        "of all pairs.",
        header=("Models", "linear CKA", "gap of cosines"),
        rows=[(_couple(names), f"{cka[names]:.3f}", f"{gap[names]:.4f}") for names in cka],
        numeric=frozenset({1, 2}),
    )


def _couple(names: str) -> str:
    return names.replace("|", " and ")


def _pair_blocks(
    record: Mapping[str, Any], kind: str, figures: Mapping[str, Figure]
) -> list[Block]:
    found: Sequence[Mapping[str, Any]] = record["pairs"]["moved"][kind]
    if not found:
        return [Paragraph("There is no such pair.", "note")]
    models = [name for name in _ORDER if name in found[0]["cosine"]]
    table = Table(
        caption="Cosines of the two embeddings.",
        header=("First image", "Second image", *models),
        rows=[
            (pair["first"], pair["second"], *(f"{pair['cosine'][name]:.3f}" for name in models))
            for pair in found
        ],
        numeric=frozenset(range(2, 2 + len(models))),
        breaks=True,
    )
    return [*_some(figures, f"pairs_{kind}"), Details("Files and numbers", [table])]


def _kernel_text(record: Mapping[str, Any]) -> str:
    kernels = record["kernels"]
    gaps = ", ".join(f"{_couple(names)} {gap:.4f}" for names, gap in kernels["gap"].items())
    kind = (
        f"kernel {kernels['student']}"
        if kernels["student"] == kernels["teacher"]
        else f"towers under the kernel {kernels['student']}, teacher under {kernels['teacher']}"
    )
    return (
        f"{count(len(kernels['images']))} images, spread over the listing; {kind}. Mean absolute "
        f"difference off the diagonal: {gaps}."
    )


def _layer_sections(record: Mapping[str, Any], figures: Mapping[str, Figure]) -> list[Section]:
    if not (layers := record["layers"]):
        return []
    text = (
        f"Linear CKA of the {layers['tokens']} of {count(layers['images'])} images, an unbiased "
        f"estimate from batches of {layers['batch']}."
    )
    numbers = Details("Numbers", [_layer_table(layers)])
    return [Section("Layers", [Paragraph(text), *_some(figures, "layers"), numbers])]


def _layer_table(layers: Mapping[str, Any]) -> Table:
    """Return how much each layer changed, and how near it is to the teacher's last one."""
    row_of = {(str(model), int(layer)): row for row, (model, layer) in enumerate(layers["names"])}
    last = dict(sorted(row_of))  # of each model; later ones win

    def likeness(first: str, second: str, layer: int) -> str:
        other = layer if second == "aligned" else last[second]
        return f"{layers['cka'][row_of[first, layer]][row_of[second, other]]:.3f}"

    couples = [("original", "aligned")]
    if "teacher" in last:
        couples += [(name, "teacher") for name in _ORDER[:2]]
    return Table(
        caption="Linear CKA of each layer of the tower with the same layer of the other"
        + (", and of both with the last layer of the teacher." if len(couples) > 1 else "."),
        header=("Layer", *(_couple("|".join(couple)) for couple in couples)),
        rows=[
            (str(layer), *(likeness(*couple, layer) for couple in couples))
            for layer in range(min(last[name] for name in _ORDER[:2]) + 1)
        ],
        numeric=frozenset(range(1, len(couples) + 1)),
    )


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    models = [(name, record[name]) for name in ("tower", "against", "teacher") if record[name]]
    return [
        *((f"{name}: fingerprint", model["fingerprint"]) for name, model in models),
        ("images: fingerprint", record["images"]["fingerprint"]),
        ("command", record["command"]),
        ("device, dtype", f"{record['settings']['device']}, {record['settings']['dtype']}"),
        *record["versions"].items(),
        ("created", record["created"]),
    ]
