"""Text and tables as wide as the terminal; in whole lines where output is a file or a pipe."""

import shutil
import textwrap
from collections.abc import Collection, Sequence

_GAP = "  "  # between two columns of a table
_WHOLE = 100_000  # columns of a file or a pipe, whose lines a program may look for


def width() -> int:
    """Columns of the terminal, by COLUMNS or its own; without one, more than lines have."""
    return shutil.get_terminal_size((_WHOLE, 24)).columns


def fill(text: str, label: str = "") -> str:
    """A paragraph in lines that fit, the first after a label and the others below its text.

    A word that is too long, such as a path, stays whole.
    """
    return textwrap.fill(
        text,
        max(width(), len(label) + 20),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(rows: Sequence[Sequence[str]], texts: Collection[int] = (0,)) -> list[str]:
    """The lines of a table that fit.

    What is too wide becomes several tables, one below the other, that all have the first column.

    Args:
        rows: the cells of the header, then those of each row.
        texts: indices of the columns of text, which begin at the left; others end at the right. A
            text that is too long for a table of its own takes several lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    used = widths[0]
    for column in range(1, len(widths)):
        used += len(_GAP) + widths[column]
        if used > width() and groups[-1]:
            groups.append([])
            used = widths[0] + len(_GAP) + widths[column]
        groups[-1].append(column)
    lines = []
    for group in groups:
        lines += [""] if lines else []
        for row in rows:
            cells = [
                row[i].ljust(widths[i]) if i in texts else row[i].rjust(widths[i])
                for i in (0, *group)
            ]
            if group[-1] in texts:
                before = _GAP.join(cells[:-1]) + _GAP
                lines += (fill(row[group[-1]], before) or before.rstrip()).split("\n")
            else:
                lines.append(_GAP.join(cells).rstrip())
    return lines
