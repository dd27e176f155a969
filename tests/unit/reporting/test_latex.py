"""LaTeX: no engine is here to compile it, so a strict reader looks at it."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latex_reader import read_tables, read_text
from reporting_samples import AVERAGE, full_comparison, make_column, make_comparison

from kuea_mllm.reporting import rows
from kuea_mllm.reporting.latex import comparison_latex
from kuea_mllm.reporting.text import one_line
from kuea_mllm.reporting.view import parse_comparison

SEEDS = {"count": 2, "differences": [-0.01, 0.03], "std": 0.02, "low": -0.02, "high": 0.08}
HOSTILE = [
    "[t] first",
    "*starred",
    "\\\\[3cm]",
    "\\input{/etc/passwd}",
    "\\end{tabular}",
    '100 % & more_of #1 $x^2$ ~ {a} <b> |c| "d" `e\'',
    "a--b---c ''quoted'' ,,low`` ?` !`",
    "Zürich façade Łódź œuvre Straße naïve Škoda",
    "\u03b1 → β ≤ 3 ± 0.5 \u00d7 10 μm 90° …",
    "“both” – ‘kinds’ — of",  # noqa: RUF001
    "模型 🎈 \u202eleft\u202c \ufeffmark",
    "line\none\u2028two\x1b[31m\x00",
    "^^M^^41 %\\",
    "ế",
]


def kinds() -> dict[str, dict[str, Any]]:
    several = full_comparison() | {"candidate": {"path": "/r/c", "model": {"name": "other"}}}
    seeds = make_comparison(make_column("a", seeds=SEEDS), make_column("b", seeds=SEEDS))
    averages = full_comparison() | {"average_unjudged": AVERAGE, "averages": {"4 shots": AVERAGE}}
    return {
        "pair": full_comparison(),
        "several": {"kind": "comparisons", "pairs": [full_comparison(), several]},
        "seeds": seeds,
        "averages": averages,
        "no average": full_comparison() | {"average": None},
        "nothing in common": make_comparison(average=None),
    }


def seen(text: str) -> str:
    """Return what a reader sees of a name: without invisible characters, unknown ones by number."""
    visible = [c for c in unicodedata.normalize("NFC", one_line(text)) if _is_visible(c)]
    return "".join(visible).replace("\u00b5", "\u03bc")


def _is_visible(character: str) -> bool:
    return character.isascii() or unicodedata.category(character) != "Cf"


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_table_is_well_formed(kind: str) -> None:
    captions, tabulars = read_tables(comparison_latex(kinds()[kind]))
    pairs = kinds()[kind].get("pairs") or [kinds()[kind]]
    assert len(captions) == len(pairs)
    for tabular in tabulars:
        rules = [line for line in tabular.rules if line != "row"]
        assert rules[:2] == ["toprule", "midrule"] and rules[-1] == "bottomrule"
        assert tabular.rules[:3] == ["toprule", "row", "midrule"]
        assert tabular.rules[-2:] != ["midrule", "bottomrule"] or kind == "nothing in common"
    expected = []
    for view in map(parse_comparison, pairs):
        expected.append([rows.header(view), *(rows.cells(row, view) for row in view.rows)])
        if spread := rows.seed_rows(view):
            expected.append([list(rows.SEED_HEADER), *spread])
    assert [tabular.cells for tabular in tabulars] == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_read_as_they_are(name: str) -> None:
    comparison = json.loads(json.dumps(make_comparison(make_column(name, seeds=SEEDS))))
    comparison["columns"][name] |= {"metric": name, "note": name, "protocol": name}
    comparison["baseline"]["model"]["name"] = name
    comparison["settings"] |= {"protocols": [name, "other"], "suite": name}
    comparison["warnings"] = [name]
    captions, tabulars = read_tables(comparison_latex(comparison))
    shown = [tabulars[0].cells[1][0], tabulars[0].cells[1][1], tabulars[1].cells[1][0]]
    if all(c.isascii() or c not in "模型🎈ế\ufffd" for c in one_line(name)):
        assert shown[0] == shown[2] == seen(name)
        assert shown[1] == f"{seen(name)}, {seen(name)}"
        assert seen(name) in captions[0]
    else:
        assert "[U+" in shown[0]


@given(st.text(max_size=40))
def test_any_name_is_one_well_formed_cell(name: str) -> None:
    comparison = make_comparison(make_column("x", column=name or "x"))
    _, (tabular,) = read_tables(comparison_latex(comparison))
    if (expected := one_line(name or "x")).isascii():
        assert tabular.cells[1][0] == expected


def test_characters_without_a_command_are_given_by_number() -> None:
    _, (tabular,) = read_tables(comparison_latex(make_comparison(make_column("模 é"))))
    assert tabular.cells[1][0] == "[U+6A21] é"


@pytest.mark.parametrize(
    "broken",
    [
        "a & b",
        "50 %",
        "a_b",
        r"\textbf{open",
        r"\ldots and",
        r"\undefined{}",
        "``",
        "$x$",
        "a^2",
        r"\\",
    ],
)
def test_reader_refuses_what_would_not_compile(broken: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        read_text(broken)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"\end{tabular}", ""),
        (r" & metric", ""),
        (r"    wild &", "    [wild &"),
        (r"\bottomrule", r"\hline"),
        (r"{max width=\linewidth}", "{width=1cm}"),
        ("wild", "wïld"),
    ],
)
def test_reader_refuses_broken_tables(before: str, after: str) -> None:
    text = comparison_latex(make_comparison(make_column("wild")))
    assert before in text
    with pytest.raises(AssertionError):
        read_tables(text.replace(before, after))
