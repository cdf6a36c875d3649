"""Records and rows as text and as figures."""

import io
import re
from pathlib import Path

import pytest

from welore.plots import GREEN, rank_ratio_figure, save, spectra_figure
from welore.records import Record
from welore.report import latex, latex_figure, markdown, number, summary


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 2, "—"), (1234567.891, 2, "1,234,567.89"), (0.5, 3, "0.500"), (12, 0, "12"), ("NaN", 2, "NaN")],
)
def test_a_number_is_printed_with_its_digits_or_as_a_dash(value, digits, text):
    assert number(value, digits) == text


def test_a_markdown_table_has_columns_of_one_width():
    lines = markdown(["a", "a long title"], [["1", "2"], ["a long cell", "—"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["1", "2"],
        ["a long cell", "—"],
    ]


def test_a_row_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        markdown(["a", "b"], [["1", "2"], ["1"]])


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("50 % & more_or #1", r"50 \% \& more\_or \#1"),
        (r"joined by '\n\n'", r"joined by '\textbackslash{}n\textbackslash{}n'"),
        ("{a} ~ ^", r"\{a\} \textasciitilde{} \textasciicircum{}"),
        ("a >= b < c", r"a $>$= b $<$ c"),
        ("—", "---"),
    ],
)
def test_signs_with_a_meaning_in_latex_are_escaped_everywhere(text, written):
    table = latex([text, "x"], [[text, "1"]], text, "tab:x", [text])
    assert table.count(written) == 4
    assert written in latex_figure("x.png", text, "fig:x")


def test_a_latex_table_is_a_booktabs_table_of_the_same_cells():
    table = latex(["a", "b", "c"], [["1", "2", "3"], ["4", "5", "6"]], "A caption.", "tab:x")
    assert r"\begin{tabular}{lrr}" in table and r"\label{tab:x}" in table
    assert re.findall(r"^(.* & .*) \\\\$", table, re.M) == ["a & b & c", "1 & 2 & 3", "4 & 5 & 6"]
    assert [table.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        table.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")
    )


@pytest.fixture
def record():
    config = {name: {"name": name} for name in ("model", "svd", "ranks", "mode")} | {"err": 0.3, "keep": None}
    found = {"dense/perplexity": 10.0, "compressed/perplexity": 1234.5, "compress/err": 0.2987, "compress/lrc": 3}
    return Record("0", "done", config, found, {"protocol": "the protocol", "device": "a CPU"}, seconds=12.4)


def test_a_summary_shows_dense_and_compressed_perplexity_and_the_protocol(record):
    text = summary(record, Path("folder"))
    assert re.search(r"^perplexity +10\.00 +1,234\.50 +—$", text, re.M)
    assert re.search(r"^err +0\.2987$", text, re.M) and re.search(r"^asked +err 0\.3$", text, re.M)
    assert "the protocol" in text and str(Path("folder/record.json")) in text and "training" not in text


def test_a_summary_shows_nan_where_the_model_breaks(record):
    record.metrics |= {"compressed/perplexity": None, "compressed/breaks_at": "model.layers.1"}
    assert re.search(r"^perplexity +10\.00 +NaN", summary(record, Path("folder")), re.M)


def names(layers, *components):
    return [f"model.layers.{layer}.{component}" for component in components for layer in range(layers)]


@pytest.mark.parametrize("panels", [1, 2, 4, 7])
def test_a_spectrum_is_a_line_in_the_panel_of_its_component(panels):
    components = [f"c{i}" for i in range(panels)]
    spectra = {name: [1.0, 0.5, 0.0] for name in names(3, *components)}
    figure = spectra_figure(spectra, dict.fromkeys(spectra, True), 0.3, "a title")
    titled = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(titled) == [f"{component}: 3 of 3 LRC" for component in components]
    for axis in titled.values():
        curves = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert len(curves) == 3 and all(list(line.get_ydata()) == [1.0, 0.5, 0.0] for line in curves)
        assert axis.get_legend() is None and axis.get_ylim() == (0, 1)
    assert figure.legends and figure.get_suptitle() == "a title"
    assert all(axis.get_xlabel() for axis in list(titled.values())[-1:])


def test_lrcs_are_green_bars_and_n_lrcs_hatched_ones_at_full_rank():
    ratios = dict(zip(names(3, "q"), [0.2, None, 0.4], strict=True))
    (axis,) = [axis for axis in rank_ratio_figure(ratios, "t").axes if axis.get_title()]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in axis.patches}
    assert [bars[layer].get_height() for layer in range(3)] == [0.2, 1.0, 0.4]
    from matplotlib.colors import to_hex

    assert [to_hex(bars[layer].get_facecolor()) == GREEN for layer in range(3)] == [True, False, True]
    assert [bool(bars[layer].get_hatch()) for layer in range(3)] == [False, True, False]
    assert axis.get_title() == "q: 2 of 3 LRC"


def test_a_figure_is_the_same_file_each_time():
    ratios = dict(zip(names(2, "q", "k"), [0.2, None, 0.4, 0.1], strict=True))
    first, second = io.BytesIO(), io.BytesIO()
    save(rank_ratio_figure(ratios, "t"), first)
    save(rank_ratio_figure(ratios, "t"), second)
    assert first.getvalue() == second.getvalue() and first.getvalue().startswith(b"\x89PNG")
