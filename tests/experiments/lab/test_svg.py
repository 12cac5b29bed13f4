"""Plots show all that they are of."""

import itertools
import re

import pytest

from experiments.lab import formats, results, svg
from experiments.lab.statistics import estimate


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 500, False, [0, 100, 200, 300, 400, 500]),
        (1.51, 1.63, False, [1.52, 1.54, 1.56, 1.58, 1.6, 1.62]),
        (64, 2048, True, [64, 128, 256, 512, 1024, 2048]),
        (1, 1e6, True, [1, 100, 1e4, 1e6]),
        (0.05, 0.9, True, [0.05, 0.1, 0.2, 0.5]),
        (2e12, 9e14, True, [2e12, 1e13, 5e13, 2e14]),
    ],
)
def test_ticks_are_round(low, high, log, expected):
    assert svg.ticks(low, high, log=log) == pytest.approx(expected)


def test_more_than_ten_lines_can_be_told_apart():
    lines = [results.line(f"line {i}", [1, 2], [[i, i + 1], [i, i + 2]]) for i in range(12)]
    plot = results.plot("Lines", "x", "y", lines)
    drawn = re.findall(r'<path class="line (.*?)"', svg.draw(plot, svg.colour_numbers([plot])))
    assert len(drawn) == len(set(drawn)) == 12
    assert drawn[11] == f"{drawn[1]} dashed"


def test_plots_of_what_is_not_finite_or_all_alike_draw():
    for ys, log in (([[None, None]], ""), ([[1, 1]], ""), ([[0, -1]], "y"), ([[2, 3]], "xy")):
        line = results.line("a", [1, 2], [[float("nan") if y is None else y for y in ys[0]]])
        text = svg.draw(formats.plain(results.plot("t", "x", "y", [line], log=log)), {"a": 0})
        assert text.startswith("<svg") and "nan" not in text
    dots = results.plot("t", "x", "", [results.dot("a", estimate([float("nan")]))])
    assert svg.draw(formats.plain(dots), {"a": 0}).count("<circle") == 0


def test_no_tick_is_cut_by_the_edge():
    line = {"name": "a", "x": [256, 1024, 16384], "y": [0.0, 0.5, 1.0]}
    plot = results.plot("t", "tokens", "y", [line | {"low": line["y"], "high": line["y"]}], log="x")
    drawn = svg.draw(formats.plain(plot), {"a": 0})
    ticks = re.findall(r'<text x="([\d.]+)" class="(mid|end)" y="[\d.]+">([\d,]+)<', drawn)
    assert [text for *_, text in ticks][-1] == "16,384"
    for x, anchor, text in ticks:
        width = svg.CHARACTER * len(text)
        assert float(x) + (width / 2 if anchor == "mid" else 0) <= svg.WIDTH


def test_no_name_of_a_dot_is_cut_by_the_edge():
    names = ["GF-MH + Mamba path + branch losses", "GF", "a" * 60]
    plot = results.plot("t", "", "", [results.dot(n, estimate([1.0, 2.0])) for n in names])
    drawn = svg.draw(formats.plain(plot), svg.colour_numbers([plot]))
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="end">([^<]+)<', drawn)
    assert "".join(text for *_, text in labels).replace(" ", "") == "".join(names).replace(" ", "")
    assert all(svg.CHARACTER * len(text) <= float(x) for x, _, text in labels)
    heights = [float(y) for _, y, _ in labels]
    assert all(b - a >= svg.LINE for a, b in itertools.pairwise(heights))
