"""Values of results as JSON and as text."""

import math
from collections.abc import Mapping

import numpy as np


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
