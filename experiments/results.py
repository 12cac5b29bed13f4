"""What the experiments of the laboratory share: command line, result files, tables and plots.

    def main(argv=None):
        parser = results.parser("fusion", __doc__)
        parser.add_argument("--steps", type=int, default=500)
        options = results.parse(parser, argv)
        config = lab.make_config(results.common(options, evaluations=5))
        ...
        results.write(options, settings=..., measures=..., tables=..., plots=..., notes=...)

    if __name__ == "__main__":
        results.run(main)

A result is a JSON file and a plot beside it. Every file has the same form, so that one program,
experiments/report.py, can show them all, and experiments/claims.py can judge by their measures:

    name, experiment, about, command, commit, device, jax, python, seconds, quick, settings
    measures  name -> estimate of experiments.statistics, or a plain number
    tables    [table(...)]
    plots     [plot(...)]
    notes     [sentence], what a reader must know to judge the numbers
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.statistics import estimate
from gt_jax import cli
from gt_jax.errors import InputError

# A tiny model for a few steps, to see that everything runs; its numbers mean nothing.
QUICK = {
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 2,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_tokens": 256,
    "optim.warmup_steps": 2,
}


def run(main) -> None:
    """main() of the command line; an InputError prints as one line, `error: ...`, with status 1."""
    # Threads of JAX's CPU backend, read when it starts. Where there are as few as two, parts of a
    # program of many runs can wait for one another forever.
    os.environ.setdefault("NPROC", "8")
    cli.run(lambda argv: main(argv[1:]))


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all experiments have.

    --seeds N gives options.seeds = range(N).
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    parser.set_defaults(experiment=name, about=doc.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try it out")
    parser.add_argument("--source", default="shakespeare", help="text, as data.source")
    parser.add_argument("--impl", default="auto", help="of the recurrences, as model.impl")
    parser.add_argument("--group", type=int, help="runs side by side; as many as fit if not given")
    parser.add_argument("--out", type=Path, help="default: in results/")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and when and by what command they were given.

    Raises:
        InputError: they are wrong; the message is one line.
    """
    began = time.perf_counter()
    options = parser.parse_args(argv)
    for name in ("seeds", "group"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name}={value} must be at least 1")
    options.began = began
    if "seeds" in options:
        options.seeds = range(options.seeds)
    given = [] if argv is None else argv
    options.command = shlex.join(["python", "-m", f"experiments.{options.experiment}", *given])
    return options


def common(options: argparse.Namespace, *, evaluations: int | None = None) -> dict:
    """Config fields that the common flags set, and --steps and --lr of a parser that has them.

    Args:
        evaluations: how many of them --steps are to have, as far apart as one another; None leaves
            it to the config.
    """
    fields = {"data.source": options.source, "model.impl": options.impl}
    flags = {"steps": "train.steps", "lr": "optim.lr"}
    fields |= {field: getattr(options, flag) for flag, field in flags.items() if flag in options}
    if evaluations:
        fields["train.eval_every"] = max(options.steps // evaluations, 1)
    return fields | (QUICK if options.quick else {})


def size(options: argparse.Namespace, full: tuple[int, int]) -> tuple[int, int]:
    """Width and blocks of the hybrid: `full`, or those of QUICK."""
    return (QUICK["model.dim"], QUICK["model.layers"]) if options.quick else full


def one_of(choices, text: str, flag: str) -> list[str]:
    """The names of a comma-separated list, in the case they have in choices.

    Raises:
        InputError: a name is none of them.
    """
    known = {name.lower(): name for name in choices}
    for name in text.split(","):
        if name.lower() not in known:
            raise InputError(f"{flag}={name} must be of {', '.join(choices)}")
    return [known[name.lower()] for name in text.split(",")]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence], note: str = "") -> dict:
    """A table of a result: cells are text, numbers, None or estimates of experiments.statistics."""
    return {"title": title, "columns": list(columns), "rows": [list(r) for r in rows], "note": note}


def plot(title: str, x: str, y: str, series: Sequence[dict], *, log: str = "") -> dict:
    """A plot of a result, of series from `line` or, all of them, from `dot`.

    Args:
        title, x, y: its title and the names of its axes; y is "" for dots.
        series: in the order of the legend.
        log: axes with logarithmic scale, "", "x", "y" or "xy".
    """
    return {"title": title, "x": x, "y": y, "log": log, "series": list(series)}


SHARE = (0.0, 1.0)  # where the values of a share lie


def line(name: str, x: Sequence[float], ys, *, within=(-math.inf, math.inf)) -> dict:
    """A line through the means over seeds of ys [seeds, points], with 95 % intervals around it.

    Args:
        within: where values lie, SHARE for one; intervals end there.
    """
    found = [estimate(column) for column in np.asarray(ys, float).T]
    least, most = within
    inside = lambda value: None if value is None else min(max(value, least), most)
    ends = {part: [inside(f[part]) for f in found] for part in ("low", "high")}
    return {"name": name, "x": [float(v) for v in x], "y": [f["mean"] for f in found]} | ends


def dot(name: str, estimated: Mapping) -> dict:
    """An estimate as a dot with its interval, on a line of its own."""
    return {"name": name} | {part: estimated[part] for part in ("mean", "low", "high")}


def write(
    options: argparse.Namespace,
    *,
    settings: Mapping,
    measures: Mapping,
    tables: Sequence[dict] = (),
    plots: Sequence[dict] = (),
    notes: Sequence[str] = (),
    name: str | None = None,
) -> dict:
    """Write a result and a PNG beside it, print the tables, and return what was written.

    Args:
        options: from `parse`; options.out names the file, results/<name>.json where it is not set.
        settings: what the numbers were taken with, values plain.
        measures, tables, plots, notes: see the module's docstring.
        name: of the result, by which claims find it; the experiment's if None. An experiment that
            can be run in several ways has one for each.

    Raises:
        OSError: the file cannot be written.
    """
    name = name or options.experiment
    path = options.out or Path(f"results/{name}.json")
    result = {
        "name": name,
        "experiment": options.experiment,
        "about": options.about,
        "command": options.command,
        "commit": _commit(),
        "device": _devices(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - options.began, 1),
        "quick": options.quick,
        "settings": dict(settings) | {"seeds": list(options.seeds), "source": options.source},
        "measures": dict(measures),
        "tables": list(tables),
        "plots": list(plots),
        "notes": list(notes),
    }
    result = plain(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    if plots:
        draw(result["plots"], path.with_suffix(".png"))
    tables = "".join("\n" + as_text(each) + "\n" for each in result["tables"])
    print(f"{tables}\n{path} after {result['seconds']:.0f} s on {result['device']}", flush=True)
    return result


def read(path: Path) -> dict:
    """A result that `write` wrote.

    Raises:
        InputError: it is missing or damaged; the message is one line.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path} is not JSON: it is damaged; run its experiment again") from None
    parts = {
        "name": str,
        "experiment": str,
        "command": str,
        "device": str,
        "settings": dict,
        "measures": dict,
    }
    parts |= {"tables": list, "plots": list, "notes": list}
    for part, kind in parts.items():
        if not isinstance(result, dict) or not isinstance(result.get(part), kind):
            raise InputError(f'{path} has no "{part}": it is no result of a laboratory experiment')
    return result


def plain(value):
    """Value as JSON takes it: six digits, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple | range | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None else str(value)


def show(cell) -> str:
    """A cell as text: "1.6328 ± 0.0049" for an estimate, where ± is half its 95 % interval."""
    if isinstance(cell, Mapping):
        mean, low, high = (cell[part] for part in ("mean", "low", "high"))
        if low is None:
            return show(mean)
        half = (high - low) / 2
        if 0 < abs(mean) < 1e-4:
            return f"{mean:.3g} ± {half:.2g}".replace("-", "−")
        most = 4 if abs(mean) >= 0.01 else 6
        digits = min(max(1 - math.floor(math.log10(half)), 0), most) if half else 4
        return f"{mean:,.{digits}f} ± {half:,.{digits}f}".replace("-", "−")
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 1000:
        text = f"{cell:,.0f}" if abs(cell) >= 10000 else f"{cell:.0f}"
    else:
        text = f"{cell:.4f}" if 0.01 <= abs(cell) < 10 else f"{cell:.4g}"
    return text.replace("-", "−")


def as_text(each: Mapping) -> str:
    """A table as lines of text."""
    cells = [each["columns"], *([show(cell) for cell in row] for row in each["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        first, *rest = (cell.ljust if i == 0 else cell.rjust for i, cell in enumerate(row))
        lines.append("  ".join([first(widths[0]), *(f(w) for f, w in zip(rest, widths[1:]))]))
    return "\n".join([each["title"], *("  " + text.rstrip() for text in lines)])


def colours(plots: Sequence[Mapping]) -> dict[str, int]:
    """Name of a series -> the number of its colour, the same in all plots of a result.

    There are ten; from 10 on they come again, dashed.
    """
    names = dict.fromkeys(series["name"] for plot in plots for series in plot["series"])
    return {name: i % 20 for i, name in enumerate(names)}


def draw(plots: Sequence[Mapping], path: Path) -> None:
    """All plots of a result in one PNG."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(len(plots), 3)
    rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    for axes, each in zip(figure.subplots(rows, columns, squeeze=False).flat, plots):
        _draw_one(axes, each, colours(plots))
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
    from experiments import svg  # imports this module

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    ends = axis.get_view_interval()
    places = svg.ticks(*ends, log=True)
    axis.set_ticks(places, [svg.tick_label(place) for place in places])
    axis.set_ticks([], minor=True)
    axes.set(**{f"{name}lim": ends})


def _devices():
    """Their kind, and their number if there are several."""
    devices = jax.local_devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return count + devices[0].device_kind


def _commit() -> str | None:
    """The commit of this repository, None where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def refuse(message: str):
    """For argparse: a wrong flag as an InputError."""
    raise InputError(message.replace("argument ", "", 1))
