"""Plots of results as inline SVG, coloured by the page's style sheet."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape

from experiments.lab.formats import show

WIDTH, HEIGHT, ROW = 400, 260, 24
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 38
CHARACTER, LINE = 7.2, 13  # width of a letter of a label, height of its lines
LABEL = 23  # characters of a label that fit beside dots


def draw(plot: Mapping, colours: Mapping[str, int]) -> str:
    """An <svg> element whose series have the classes of their names' numbers in `colours`."""
    series = plot["series"]
    if series and "x" not in series[0]:
        return _dots(plot, colours)
    return _lines(plot, colours)


def colour_numbers(plots: Sequence[Mapping]) -> dict[str, int]:
    """Name of a series -> the number of its colour, the same in all plots of a result.

    There are ten; from 10 on they come again, dashed.
    """
    names = dict.fromkeys(series["name"] for plot in plots for series in plot["series"])
    return {name: i % 20 for i, name in enumerate(names)}


def class_of(number: int) -> str:
    """Of the page's style sheet: c0 to c9, and the same dashed."""
    return f"c{number}" if number < 10 else f"c{number - 10} dashed"


def ticks(low: float, high: float, *, log: bool = False, most: int = 6) -> list[float]:
    """Round numbers from low to high, about `most`: of steps 1, 2 or 5, or powers of 2 or 10."""
    if log:
        if high / low < 1000 and low > 0.5 and high < 1e5:
            places = _powers(2, low, high)
        else:
            places = _powers(10, low, high)
            if len(places) < most // 2:
                finer = sorted(m * p for p in _powers(10, low / 10, high) for m in (1, 2, 5))
                places = [p for p in finer if low <= p * (1 + 1e-9) and p <= high * (1 + 1e-9)]
        return places[:: max(1, math.ceil(len(places) / most))]
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(m * size for m in (1, 2, 5, 10) if (high - low) / (m * size) <= most)
    return [
        n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _powers(base: int, low: float, high: float) -> list[float]:
    first, last = (math.log(v, base) for v in (low, high))
    return [float(base) ** n for n in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]


class _Axis:
    """Places of values between two ends of the drawing."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool, pad: float):
        self._log, self._start = log, start
        low, high = min(values), max(values)
        if log:
            low, high = math.log(low), math.log(high)
        if high - low < 1e-12:
            low, high = low - (abs(low) or 1) / 20, high + (abs(high) or 1) / 20
        extra = pad * (high - low)
        self._low, self._high = low - extra, high + extra
        self._scale = (end - start) / (self._high - self._low)

    def __call__(self, value: float) -> float:
        value = math.log(value) if self._log else value
        return round(self._start + (value - self._low) * self._scale, 1)

    def ticks(self) -> list[float]:
        ends = (self._low, self._high)
        return ticks(*map(math.exp, ends), log=True) if self._log else ticks(*ends)


def _lines(plot: Mapping, colours) -> str:
    log_x, log_y = ("x" in plot["log"], "y" in plot["log"])
    usable = [
        [p for p in zip(s["x"], s["y"], s["low"], s["high"]) if _fits(p, log_x, log_y)]
        for s in plot["series"]
    ]
    xs = [x for points in usable for x, *_ in points]
    if not xs:
        return f'<svg viewBox="0 0 {WIDTH} 40"><text x="0" y="24">no finite values</text></svg>'
    ys = [v for points in usable for _, *values in points for v in values if v is not None]
    ys = [v for v in ys if v > 0 or not log_y]
    x = _Axis(xs, LEFT, WIDTH - RIGHT, log=log_x, pad=0)
    y = _Axis(ys, HEIGHT - BOTTOM, TOP, log=log_y, pad=0.04)
    parts = [*_x_axis(x, HEIGHT - BOTTOM, plot["x"]), *_y_axis(y)]
    classes = [class_of(colours[s["name"]]) for s in plot["series"]]
    for points, colour in zip(usable, classes):
        banded = [p for p in points if p[2] is not None and (p[2] > 0 or not log_y)]
        if len(banded) > 1:
            edge = [(x(p[0]), y(p[3])) for p in banded] + [(x(p[0]), y(p[2])) for p in banded[::-1]]
            parts.append(f'<path class="band {colour}" d="{_path(edge)}Z"/>')
    for points, series, colour in zip(usable, plot["series"], classes):
        label = escape(series["name"])
        if points:
            last = f"{label}: {show(points[-1][1])} at {show(points[-1][0])}"
            path = _path([(x(p[0]), y(p[1])) for p in points])
            parts.append(f'<path class="line {colour}" d="{path}"><title>{last}</title></path>')
        if len(points) <= 12:
            parts += [
                f'<circle class="{colour}" cx="{x(p[0])}" cy="{y(p[1])}" r="2.6"><title>'
                f"{label}: {show(p[1])} at {show(p[0])}</title></circle>"
                for p in points
            ]
    return _svg(plot, HEIGHT, parts)


def _dots(plot: Mapping, colours) -> str:
    series = plot["series"]
    labels = [textwrap.wrap(s["name"], LABEL) for s in series]
    left = max(len(line) for label in labels for line in label) * CHARACTER + 14
    rows = [ROW + LINE * (len(label) - 1) for label in labels]
    height = TOP + sum(rows) + BOTTOM
    values = [s[part] for s in series for part in ("mean", "low", "high") if s[part] is not None]
    log = "x" in plot["log"] and min(values, default=1) > 0
    x = _Axis(values or [0.0], left, WIDTH - RIGHT, log=log, pad=0.04)
    parts = _x_axis(x, height - BOTTOM, plot["x"])
    for i, (s, label) in enumerate(zip(series, labels)):
        y = TOP + sum(rows[:i]) + rows[i] / 2
        for n, line in enumerate(label):
            place = y + 4 + LINE * (n - (len(label) - 1) / 2)
            text = f'<text x="{left - 8:.0f}" y="{place}" class="end">{escape(line)}</text>'
            parts.append(text)
        if s["mean"] is None:
            continue
        text, colour = f"{escape(s['name'])}: {show(s)}", class_of(colours[s["name"]])
        if s["low"] is not None:
            parts.append(f'<path class="whisker {colour}" d="M{x(s["low"])} {y}H{x(s["high"])}"/>')
        parts.append(
            f'<circle class="{colour}" cx="{x(s["mean"])}" cy="{y}" r="4.5">'
            f"<title>{text}</title></circle>"
        )
    return _svg(plot, height, parts)


def _fits(point, log_x: bool, log_y: bool) -> bool:
    x, y, *_ = point
    return x is not None and y is not None and (x > 0 or not log_x) and (y > 0 or not log_y)


def _x_axis(x: _Axis, bottom: float, label: str) -> list[str]:
    parts = []
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x(tick)} {TOP}V{bottom}"/>')
        text = tick_label(tick)
        centred = x(tick) + len(text) * CHARACTER / 2 <= WIDTH  # or the edge would cut it
        place = f'x="{x(tick)}" class="mid"' if centred else f'x="{WIDTH}" class="end"'
        parts.append(f'<text {place} y="{bottom + 16}">{text}</text>')
    return [
        *parts,
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 33}" class="end">{escape(label)}</text>',
    ]


def _y_axis(y: _Axis) -> list[str]:
    parts = []
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(tick) + 4}" class="end">{tick_label(tick)}</text>'
        )
    return parts


def tick_label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
    if abs(value) >= 1e5:
        return f"{value:.3g}".replace("e+", "e").replace("e0", "e")
    digits = 2 if abs(value) < 0.01 else 3 if abs(value) < 0.1 else 6  # more would not fit
    return f"{round(value, 10):,.{digits}g}".replace("-", "−")


def _path(points) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _svg(plot: Mapping, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(plot["title"])}">'
        f"{''.join(parts)}</svg>"
    )
