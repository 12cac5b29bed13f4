"""curve.png: a run's losses, learning rate, auxiliary losses and gates over its steps."""

import importlib
import io
import threading
from pathlib import Path

from gt_jax import thresholds
from gt_jax.training import metrics, watch

# Slow to import: a second. No window is opened this way.
_PLOTTING = ("matplotlib.figure", "matplotlib.backends.backend_agg")

_STEP = "Last step"  # among the words that a PNG file carries


def prepare_to_draw() -> None:
    """Import what `draw_curve` needs; for when there is nothing else to do."""
    for name in _PLOTTING:
        importlib.import_module(name)


def prepare_to_draw_beside() -> None:
    """`prepare_to_draw` in a thread, for when the device computes for long and Python waits."""
    threading.Thread(target=prepare_to_draw, name="plotting", daemon=True).start()


def draw_curve(workdir: str | Path, *, title: str, unit: str, judged_from: int = 0) -> bytes:
    """Draw a run's metrics.jsonl.

    Args:
        workdir: the run.
        title: over the figure.
        unit: of the loss, e.g. "nats per character".
        judged_from: the step from which on collapsed gates are marked.

    Returns:
        The PNG file, which `step_of` reads.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = metrics.read(workdir)
    has_gate = any("gate" in row for row in rows)
    terms = sorted({name for row in rows for name in row if name.startswith("debate_")})
    heights = [3, 1] + [1.6] * bool(terms) + [1.6] * has_gate
    figure = Figure(figsize=(8, 6 + 2.5 * (len(heights) - 2)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(title)

    axes[0].plot(*_series(rows, "loss"), color="C0", lw=1, alpha=0.8, label="training")
    steps, losses = _series(rows, "validation_loss")
    axes[0].plot(steps, losses, color="C1", lw=1.8, marker="o", ms=3.5, label="validation")
    axes[0].set_ylabel(f"loss ({unit})")
    axes[0].legend(frameon=False)
    if losses:
        best = min(losses)
        axes[0].axhline(best, color="C1", lw=0.8, ls=":")
        axes[0].annotate(
            f"best {best:.4f}", (0, best), (4, 3), ("axes fraction", "data"), "offset points",
            va="bottom", color="C1",
        )  # fmt: skip

    axes[1].plot(*_series(rows, "lr"), color="C2")
    axes[1].set_ylabel("learning rate")
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    for name in terms:
        axes[2].plot(*_series(rows, name), lw=1.3, label=name.removeprefix("debate_"))
    if terms:
        axes[2].set_ylabel("auxiliary losses\n(without weights)")
        axes[2].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    if has_gate:
        _draw_gates(axes[-1], rows, judged_from)

    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    png = io.BytesIO()
    last = rows[-1]["step"] if rows else 0
    figure.savefig(png, format="png", dpi=150, metadata={_STEP: str(last)})
    return png.getvalue()


def step_of(curve: Path) -> int | None:
    """The last step that a file of `draw_curve` shows; None if it is missing or another file."""
    from PIL import Image

    try:
        with Image.open(curve) as image:
            return int(image.info[_STEP])
    except (OSError, KeyError, ValueError):
        return None


def _draw_gates(ax, rows, judged_from):
    """Mean gates by block, with a cross or a ring where one is closed or constant."""
    steps, gates = _series(rows, "gate")
    layers = len(gates[0])
    shades = _shades(layers)
    found = [(row, watch.collapsed(row)) for row in rows if row["step"] >= judged_from]
    last = found[-1][1] if found else {}
    for layer in range(layers):
        said = f", {last[layer]}" if layer in last else ""
        values = [gate[layer] for gate in gates]
        ax.plot(steps, values, color=shades[layer], lw=1.3, label=f"layer {layer}{said}")
        for kind, marker in (("closed", "x"), ("constant", "o")):
            places = [row for row, collapsed in found if collapsed.get(layer) == kind]
            at = [row["gate"][layer] for row in places]
            ax.plot([row["step"] for row in places], at, marker, color="C3", ms=4, fillstyle="none")
    if found and any(collapsed for _, collapsed in found):
        for low, high in ((0, thresholds.GATE_CLOSED), (1 - thresholds.GATE_CLOSED, 1)):
            ax.axhspan(low, high, color="C3", alpha=0.15, lw=0)
        ax.set_title("x: closed, o: constant", fontsize="small", loc="right", color="C3")
    ax.set_ylabel("mean gate\n(share of RWKV)")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _series(rows, name):
    kept = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in kept], [row[name] for row in kept]


def _shades(count):
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]
