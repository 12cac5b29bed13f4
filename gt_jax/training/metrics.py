"""metrics.jsonl, a line for each logged step, and the loggers that get the same numbers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gt_jax.data.corpora import replace_file
from gt_jax.training.loggers import Service, TensorBoard

# What depends on the clock and the device, and so differs between two runs that are the same.
OF_THE_MACHINE = ("tokens_per_second", "peak_memory", "share_of_peak")


class Metrics:
    """Appends one JSON object per logged step to metrics.jsonl, and gives it to the loggers.

    Lines of steps after `start` are dropped: a resumed run writes them again.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start: int,
        tensorboard: bool,
        services: Sequence[Service] = (),
    ):
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= start]
        self._begin_with(kept)
        boards = [TensorBoard(workdir, kept)] if tensorboard else []
        self._loggers = [*boards, *services]

    def write(self, row: dict) -> None:
        """Write one row: "step", and numbers or short lists of numbers (NaN becomes null).

        It takes the place of the last one if that is of the same step.
        """
        row = plain(row)
        if row["step"] == self._last:
            self._file.close()
            self._begin_with([r for r in read(self._path.parent) if r["step"] < row["step"]])
        self._last = row["step"]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.write(row)

    def flush(self) -> None:
        """Have what was written on the disk, whatever happens to the process."""
        for logger in self._loggers:
            logger.flush()

    def _begin_with(self, rows: list[dict]) -> None:
        replace_file(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._last = rows[-1]["step"] if rows else None

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()


def read(workdir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, oldest first, without lines that a crash damaged."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def plain(row: dict) -> dict:
    """A row as metrics.jsonl has it: Python numbers, None for what is not finite, or lists."""
    return {"step": row["step"]} | {name: _plain(value) for name, value in row.items()}


def _plain(value):
    """A Python number, None for what is not finite, or a list of them; 6 digits."""
    if isinstance(value, int) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim:
        return [_plain(v) for v in array]
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    return float(f"{array:.6g}") if math.isfinite(array) else None
