from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from reporting_samples import full_comparison, make_column, make_comparison

from kuea_mllm.errors import UserError
from kuea_mllm.reporting import figures


def make_kernels(size: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kernels = {}
    for index, name in enumerate(("original", "aligned", "teacher")):
        features = rng.normal(size=(size, 4)) + index
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        kernels[name] = features @ features.T
    return kernels


def images_of(figure: Figure) -> list[AxesImage]:
    return [image for axes in figure.axes for image in axes.get_images()]


def test_kernel_matrices_share_one_scale_and_one_bar() -> None:
    figure = figures.kernel_matrices(make_kernels())
    images = images_of(figure)
    assert len(images) == 3
    assert len({image.get_clim() for image in images}) == 1
    assert len(figure.axes) == 4


def test_kernel_scale_covers_all_values_off_the_diagonal() -> None:
    kernels = make_kernels()
    mask = ~np.eye(12, dtype=bool)
    values = np.concatenate([kernel[mask] for kernel in kernels.values()])
    low, high = images_of(figures.kernel_matrices(kernels))[0].get_clim()
    assert (low, high) == (values.min(), values.max())


def test_kernel_titles_tell_the_gap_to_the_teacher() -> None:
    kernels = make_kernels()
    kernels["aligned"] = kernels["teacher"]
    titles = [axes.get_title() for axes in figures.kernel_matrices(kernels).axes]
    assert titles[1] == "aligned\nmean gap to teacher 0.000"
    assert titles[2].strip() == "teacher"


def test_kernel_groups_are_named() -> None:
    figure = figures.kernel_matrices(make_kernels(), ["ball"] * 5 + ["cube"] * 7)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["ball", "cube"]


def test_large_kernel_matrices_are_cut_and_say_so() -> None:
    size = figures.MAX_KERNEL_ITEMS + 10
    figure = figures.kernel_matrices({"teacher": np.eye(size)})
    assert np.asarray(images_of(figure)[0].get_array()).shape == (figures.MAX_KERNEL_ITEMS,) * 2
    assert f"of {size}" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(
    "kernels",
    [{"a": np.eye(3), "b": np.eye(4)}, {"a": np.ones((3, 2))}, {"a": np.ones((1, 1))}, {}],
)
def test_kernel_matrices_of_wrong_shapes_are_refused(kernels: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="kernel matri"):
        figures.kernel_matrices(kernels)


def test_kernel_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="2 labels"):
        figures.kernel_matrices(make_kernels(), ["a", "b"])


def test_paired_differences_draw_each_interval_in_points() -> None:
    axes = figures.paired_differences(full_comparison()).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["miniworld_textvqa", "miniworld_spatial", "pope", "average"]
    ends = [np.asarray(line.get_xdata(), dtype=float) for line in axes.get_lines()]
    spans = [span for span in ends if len(span) == 2]
    np.testing.assert_allclose(spans[1], [1.2, 5.6])
    assert "percentage points (95 % interval)" in axes.get_xlabel()


def test_paired_differences_of_nothing_can_be_written() -> None:
    figure = figures.paired_differences(make_comparison(average=None))
    assert figure.axes[0].texts[0].get_text() == "no column is paired"
    assert "<svg" in figures.figure_svg(figure, "nothing")


def test_long_names_do_not_crowd_out_the_figure() -> None:
    figure = figures.paired_differences(make_comparison(make_column("x" * 500)))
    figures.figure_svg(figure, "long")
    assert figure.axes[0].get_position().width > 0.3


def test_names_are_drawn_as_they_are() -> None:
    comparison = make_comparison(make_column("$\\frac{1$ 任务"))
    assert "<svg" in figures.figure_svg(figures.paired_differences(comparison), "names")


def test_svg_is_the_same_every_time() -> None:
    first, second = (
        figures.figure_svg(figures.kernel_matrices(make_kernels()), "kernels") for _ in range(2)
    )
    assert first == second


def test_svgs_of_two_names_share_no_id() -> None:
    figure = figures.kernel_matrices(make_kernels())
    found = [
        set(re.findall(r'\sid="([^"]+)"', figures.figure_svg(figure, name))) for name in ("a", "b")
    ]
    assert found[0] and not found[0] & found[1]


def test_svg_references_resolve() -> None:
    svg = figures.figure_svg(figures.paired_differences(full_comparison()), "paired")
    ids = re.findall(r'\sid="([^"]+)"', svg)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert used
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in used} <= set(ids)


def test_svg_name_must_be_an_identifier() -> None:
    with pytest.raises(ValueError, match="letters"):
        figures.figure_svg(Figure(), 'a"><script>')


def test_drawing_leaves_the_settings_alone() -> None:
    before = dict(mpl.rcParams)
    figures.figure_svg(figures.kernel_matrices(make_kernels()), "loss")
    assert dict(mpl.rcParams) == before


def test_save_figure_by_ending(tmp_path: Path) -> None:
    figure = figures.kernel_matrices(make_kernels())
    figures.save_figure(figure, tmp_path / "a.png")
    figures.save_figure(figure, tmp_path / "a b.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a b.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match=r"a\.pdf"):
        figures.save_figure(figure, tmp_path / "a.pdf")
