"""Plots of results as PNG, by matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.lab import svg


def draw(plots: Sequence[Mapping], path: Path) -> None:
    """All plots of a result in one PNG."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(len(plots), 3)
    rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    for axes, each in zip(figure.subplots(rows, columns, squeeze=False).flat, plots):
        _draw_one(axes, each, svg.colour_numbers(plots))
    for axes in figure.axes[len(plots) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_one(axes, each: Mapping, numbers: Mapping[str, int]) -> None:
    nan = lambda values: [math.nan if v is None else v for v in values]
    for i, series in enumerate(each["series"]):
        number = numbers[series["name"]]
        colour, dashes = f"C{number % 10}", "-" if number < 10 else "--"
        if "x" in series:
            x, low, high = series["x"], nan(series["low"]), nan(series["high"])
            style = {"color": colour, "lw": 1.5, "marker": "o" if len(x) <= 12 else None, "ms": 4}
            axes.plot(x, nan(series["y"]), dashes, label=series["name"], **style)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        else:
            mean, low, high = nan([series["mean"], series["low"], series["high"]])
            axes.plot([low, high], [i, i], color=colour, lw=2)
            axes.plot([mean], [i], "o", color=colour, ms=5)
    if each["series"] and "x" not in each["series"][0]:
        axes.set_yticks(range(len(each["series"])), [s["name"] for s in each["series"]])
        axes.invert_yaxis()
    else:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # beside the lines
        axes.legend(frameon=False, fontsize="small", **place)
    axes.set(title=each["title"], xlabel=each["x"], ylabel=each["y"])
    for name in each["log"]:
        _scale_by_log(axes, name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_by_log(axes, name: str) -> None:
    """The axis of this name, "x" or "y", with the ticks it has on the page."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    ends = axis.get_view_interval()
    places = svg.ticks(*ends, log=True)
    axis.set_ticks(places, [svg.tick_label(place) for place in places])
    axis.set_ticks([], minor=True)
    axes.set(**{f"{name}lim": ends})
