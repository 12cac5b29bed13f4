"""Where a run's numbers go: metrics.jsonl always, TensorBoard if wanted, curve.png at the end."""

import json
import math
from pathlib import Path

import numpy as np

from gt_jax.data.corpora import replace_file


class Metrics:
    """Appends one JSON object per logged step to metrics.jsonl, and the same to tensorboard/.

    Lines of steps after `start` are dropped: a resumed run writes them again.
    """

    def __init__(self, workdir: str | Path, *, start: int, tensorboard: bool):
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= start]
        self._begin_with(kept)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

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
        if self._board is None:
            return
        for name, value in row.items():
            values = (
                {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else None
            )
            for tag, scalar in (values or {name: value}).items():
                if name != "step" and scalar is not None:
                    self._board.add_scalar(tag, scalar, row["step"])

    def _begin_with(self, rows: list[dict]) -> None:
        replace_file(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._last = rows[-1]["step"] if rows else None

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


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
