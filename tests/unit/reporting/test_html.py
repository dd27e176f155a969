from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_page import Page, require_accessible, require_self_contained
from reporting_samples import (
    full_comparison,
    make_column,
    make_comparison,
    make_example,
    make_png,
    make_summary,
)

from kuea_mllm.errors import EnvironmentFailure
from kuea_mllm.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Details,
    Figure,
    FlipColumn,
    FlipGroup,
    Flips,
    Gallery,
    KeyValues,
    Paragraph,
    Report,
    Section,
    Table,
)
from kuea_mllm.reporting.html import (
    make_mark,
    make_picture,
    render_html,
    write_quickstart_report,
)
from kuea_mllm.reporting.pages import comparison_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>'
HOSTILE = (
    '</p><script>alert(1)</script><img src="http://evil.example/x.png" onerror="x()">{{ 7*7 }}'
)


def page_of(*blocks: Block) -> Page:
    return Page(render_html(Report("Title", sections=[Section("Part", blocks)])))


@pytest.fixture(scope="module")
def report_text() -> str:
    report = comparison_report(
        comparison=full_comparison(),
        baselines=[make_summary("llava-stock")],
        candidates=[make_summary("llava-kuea")],
        flips=[
            FlipColumn(
                "miniworld_textvqa",
                gained=FlipGroup(5, [make_example()], [make_example(candidate_answer=None)]),
                lost=FlipGroup(
                    2,
                    [
                        make_example(baseline_score=1.0, candidate_score=0.3, image=None),
                        make_example(
                            candidate_answer=None, candidate_score=None, image=make_png(300)
                        ),
                    ],
                ),
                file="samples/miniworld_textvqa.jsonl",
            )
        ],
        extra_sections=[Section("Kernels", [Figure(SVG, "Heat maps", "Kernels")])],
        provenance=[("command", "kuea-mllm compare a b")],
    )
    return render_html(report)


def test_page_is_accessible(report_text: str) -> None:
    require_accessible(Page(report_text))


def test_page_loads_nothing(report_text: str) -> None:
    require_self_contained(report_text, Page(report_text))
    assert "http://" not in report_text and "https://" not in report_text


def test_page_has_a_strict_policy(report_text: str) -> None:
    policies = [m["content"] for m in Page(report_text).all("meta") if "http-equiv" in m]
    assert len(policies) == 1
    assert str(policies[0]).startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    )


def test_page_adapts_to_dark_mode(report_text: str) -> None:
    assert "prefers-color-scheme: dark" in report_text


def test_comparison_table_holds_the_numbers(report_text: str) -> None:
    rows = Page(report_text).cells
    assert rows[1] == [
        "miniworld_textvqa",
        "▲ better",
        "+3.4 [1.2, 5.6]",
        "41.2",
        "44.6",
        "0.004",
        "71 / 44",
        "800",
        "exact_match",
    ]
    assert [row[1] for row in rows[2:6]] == [
        "● cannot tell",
        "▼ worse",
        "○ not tested",
        "● cannot tell",
    ]


def test_finding_stands_first(report_text: str) -> None:
    text = " ".join(Page(report_text).text.split())
    assert text.index("1 column cannot be told apart") < text.index("Scores in percent")


def test_marks_are_words(report_text: str) -> None:
    text = Page(report_text).text
    for word in ("right", "wrong", "partly right (0.30)", "not scored", "no answer"):
        assert word in text


def test_report_is_the_same_every_time() -> None:
    report = Report("A", sections=[Section("B", [Table("c", ["x"], [["1"]])])])
    assert render_html(report) == render_html(report)


@pytest.mark.parametrize(
    "block",
    [
        Paragraph(HOSTILE),
        Bullets([HOSTILE]),
        Figure(SVG, HOSTILE, HOSTILE),
        Table(HOSTILE, [HOSTILE, "x"], [[HOSTILE, Cell(HOSTILE)]]),
        KeyValues([(HOSTILE, HOSTILE)]),
        Code(HOSTILE),
        Details(HOSTILE, [Paragraph(HOSTILE)]),
        Gallery(
            [
                make_example(
                    task=HOSTILE,
                    doc_id=HOSTILE,
                    question=HOSTILE,
                    expected=HOSTILE,
                    baseline_answer=HOSTILE,
                    candidate_answer=HOSTILE,
                )
            ],
            HOSTILE,
            HOSTILE,
        ),
        Flips(
            [
                FlipColumn(
                    HOSTILE,
                    FlipGroup(9, [], [make_example(question=HOSTILE)]),
                    FlipGroup(0),
                    HOSTILE,
                )
            ],
            HOSTILE,
            HOSTILE,
        ),
    ],
    ids=lambda block: type(block).__name__,
)
def test_hostile_text_is_shown_as_text(block: Block) -> None:
    page = page_of(block)
    assert HOSTILE in page.text
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))


def test_hostile_titles_and_names_are_shown_as_text() -> None:
    comparison = make_comparison(make_column(HOSTILE), warnings=[HOSTILE])
    report = comparison_report(
        comparison=comparison,
        baselines=[make_summary(HOSTILE)],
        candidates=[make_summary(HOSTILE)],
    )
    page = Page(render_html(report))
    assert not page.all("script")
    assert page.text.count(HOSTILE) > 3


def test_huge_answer_is_cut_and_says_so() -> None:
    text = render_html(
        Report(
            "A",
            sections=[Section("B", [Gallery([make_example(baseline_answer="x" * 10**6)], "m")])],
        )
    )
    assert len(text) < 50_000
    assert "1,000,000 characters in all" in text


def test_odd_characters_survive_or_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.html"
    answer = "🎈 أزرق \u202egnp\u202c \ud800 \x00 \x1b[31m"
    gallery = Gallery([make_example(baseline_answer=answer)], "m")
    write_quickstart_report(path, title="A", sections=[Section("B", [gallery])])
    text = path.read_text(encoding="utf-8")
    assert "🎈 أزرق" in text
    assert not {"\x00", "\x1b"} & set(text)
    assert f"<bdi>{answer[:3]}" in text


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(EnvironmentFailure, match=r"r\.html"):
        write_quickstart_report(tmp_path / "r.html", title="A", sections=[])
    assert list(tmp_path.iterdir()) == []


def test_empty_answer_is_visible() -> None:
    assert "empty" in page_of(Gallery([make_example(baseline_answer=" ")], "m")).text


def test_gallery_of_one_model_has_one_answer() -> None:
    assert page_of(Gallery([make_example()], "m")).text.count("KUEA") == 1


def test_tiny_pictures_keep_their_pixels() -> None:
    assert make_picture(make_png(32)).is_tiny
    assert not make_picture(make_png(300)).is_tiny
    assert make_picture(b"\xff\xd8\xff\xe0").uri.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("image", [b"GIF89a", b"", "<html>", b"<svg></svg>"])
def test_other_pictures_are_refused(image: str | bytes) -> None:
    with pytest.raises(ValueError, match="SVG"):
        make_picture(image)


def test_marks_by_score() -> None:
    words = [make_mark(score).word for score in (1.0, 0.0, 0.5, None)]
    assert words == ["right", "wrong", "partly right (0.50)", "not scored"]


def test_table_rows_must_fit_the_header() -> None:
    with pytest.raises(ValueError, match="1 cells"):
        Table("c", ["a", "b"], [["1"]])


def test_totals_go_into_the_foot() -> None:
    page = page_of(Table("c", ["a", "b"], [["x", "1"], ["sum", "1"]], footer=1))
    tags = [tag for tag, _ in page.tags]
    assert tags.index("tbody") < tags.index("tfoot")
    assert page.cells == [["a", "b"], ["x", "1"], ["sum", "1"]]


def test_nested_sections_go_one_level_down() -> None:
    inner = Section("Inner", [Paragraph("x")], [Section("Innermost")])
    page = Page(render_html(Report("A", sections=[Section("Outer", sections=[inner])])))
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)] == ["h1", "h2", "h3", "h4"]


def test_report_without_examples_has_no_section_for_them() -> None:
    report = comparison_report(
        comparison=full_comparison(),
        baselines=[make_summary()],
        candidates=[make_summary()],
        provenance=[("command", "x")],
    )
    page = Page(render_html(report))
    assert page.text.count("Where this comes from") == 2
    assert "Flipped questions" not in page.text


def test_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, kuea_mllm.reporting, kuea_mllm.reporting.tables, kuea_mllm.reporting.html;"
        "print(sorted({'torch', 'matplotlib', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_commands_between_backticks_are_set_as_code() -> None:
    page_text = render_html(
        Report(
            "A",
            sections=[Section("B", [Paragraph("use `kuea-mllm <b>`, `x`"), Bullets(["5` wide"])])],
        )
    )
    assert "use <code>kuea-mllm &lt;b&gt;</code>, <code>x</code>" in page_text
    assert "5` wide" in page_text


def test_long_row_names_may_break_at_underscores() -> None:
    text = render_html(Report("A", sections=[Section("B", [Table("c", ["x"], [["a_b_<c>_d"]])])]))
    assert "a_<wbr>b_&lt;c&gt;_d" in text
    assert "a_b_<c>_d" in Page(text).text


def test_print_is_light_whole_and_repeats_no_totals(report_text: str) -> None:
    printed = report_text.split("@media print {")[1].split("\n}\n", maxsplit=1)[0]
    for rule in (
        "color-scheme: light",
        "tfoot { display: table-row-group",
        "th:first-child { position: static",
        "overflow: visible",
        "white-space: pre-wrap",
    ):
        assert rule in printed
    kept_whole = next(line for line in printed.splitlines() if "figure, tr" in line)
    assert "break-inside: avoid" in kept_whole
    headings = next(line for line in printed.splitlines() if "h1, h2" in line)
    assert "break-after: avoid" in headings
