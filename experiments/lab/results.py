"""Results of the laboratory: files of numbers, tables and plots, all of one form.

    def main(argv=None):
        parser = command.parser("fusion", __doc__)
        parser.add_argument("--steps", type=int, default=500)
        options = command.parse(parser, argv)
        config = lab.make_config(command.common(options, evaluations=5))
        ...
        results.write(options, settings=..., measures=..., tables=..., plots=..., notes=...)

    if __name__ == "__main__":
        command.run(main)

A result is a JSON file and a plot beside it. Every file has the same form, so that lab/report.py
can show them all, and lab/claims.py can judge by their measures:

    name, experiment, about, command, commit, device, jax, python, seconds, quick, settings
    measures  name -> estimate of lab/statistics.py, or a plain number
    tables    [table(...)]
    plots     [plot(...)]
    notes     [sentence], what a reader must know to judge the numbers
"""

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.lab import formats, png
from experiments.lab.statistics import estimate
from gt_jax.errors import InputError

FOLDER = Path("experiments/results")  # where results are written if nothing else is said


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence], note: str = "") -> dict:
    """A table of a result: cells are text, numbers, None or estimates of lab/statistics.py."""
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
    found = [_within(estimate(column), within) for column in np.asarray(ys, float).T]
    ends = {part: [f[part] for f in found] for part in ("low", "high")}
    return {"name": name, "x": [float(v) for v in x], "y": [f["mean"] for f in found]} | ends


def dot(name: str, estimated: Mapping, *, within=(-math.inf, math.inf)) -> dict:
    """An estimate as a dot with its interval, on a line of its own; `within` as of `line`."""
    ended = _within(estimated, within)
    return {"name": name} | {part: ended[part] for part in ("mean", "low", "high")}


def _within(estimated: Mapping, ends: tuple[float, float]) -> dict:
    """An estimate whose interval ends where its values do."""
    least, most = ends
    inside = lambda value: None if value is None else min(max(value, least), most)
    return dict(estimated) | {part: inside(estimated[part]) for part in ("low", "high")}


def write(
    options: argparse.Namespace,
    *,
    settings: Mapping,
    measures: Mapping,
    tables: Sequence[dict] = (),
    plots: Sequence[dict] = (),
    notes: Sequence[str] = (),
    name: str | None = None,
    origin_of: Mapping | None = None,
    shown: bool = True,
) -> dict:
    """Write a result and a PNG beside it, print its tables, and return what was written.

    Args:
        options: from `parse`; options.out names the file, else `path_of` does.
        settings: what the numbers were taken with, values plain.
        measures, tables, plots, notes: see the module's docstring.
        name: of the result, by which claims find it; the experiment's if None. An experiment that
            can be run in several ways has one for each.
        origin_of: what `origin` said where the measures are from, and the seconds it took there;
            None where they are from here.
        shown: whether tables are printed; not while more is measured.

    Raises:
        OSError: the file cannot be written.
    """
    name = name or options.experiment
    path = path_of(options, name)
    result = {
        "name": name,
        "experiment": options.experiment,
        "about": options.about,
        "command": options.command,
        **origin(),
        "seconds": round(time.perf_counter() - options.began, 1),
        **(origin_of or {}),
        "quick": options.quick,
        "settings": dict(settings) | {"seeds": list(options.seeds), "source": options.source},
        "measures": dict(measures),
        "tables": list(tables),
        "plots": list(plots),
        "notes": list(notes),
    }
    result = formats.plain(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    if plots:
        png.draw(result["plots"], path.with_suffix(".png"))
    if not shown:
        return result
    tables = "".join("\n" + formats.as_text(each) + "\n" for each in result["tables"])
    print(f"{tables}\n{path} after {result['seconds']:.0f} s on {result['device']}", flush=True)
    return result


def path_of(options, name: str | None = None) -> Path:
    """The file of a result: --out, or one in experiments/results/, or with --quick in quick/ there.

    A trial must not take the place of what was measured.
    """
    folder = FOLDER / "quick" if options.quick else FOLDER
    return options.out or folder / f"{name or options.experiment}.json"


def origin() -> dict:
    """What numbers come from: the commit, None where there is no git, device and versions."""
    return {
        "commit": _commit(),
        "device": _devices(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


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
