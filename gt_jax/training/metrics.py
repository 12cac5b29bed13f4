"""Where a run's numbers go: metrics.jsonl always, TensorBoard if wanted, curve.png at the end."""

import json
import math
from pathlib import Path

import numpy as np


class Metrics:
    """Appends one JSON object per logged step to metrics.jsonl, and the same to tensorboard/.

    Lines of steps after `start` are dropped: a resumed run writes them again.
    """

    def __init__(self, workdir, *, start: int, tensorboard: bool):
        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(workdir) if row["step"] <= start]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

    def write(self, row: dict) -> None:
        """Write one row: "step", and numbers or short lists of numbers (NaN becomes null)."""
        row = {"step": row["step"]} | {name: _plain(value) for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items() if self._board else ():
            values = (
                {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else None
            )
            for tag, scalar in (values or {name: value}).items():
                if name != "step" and scalar is not None:
                    self._board.add_scalar(tag, scalar, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read(workdir) -> list[dict]:
    """The rows of a run's metrics.jsonl, oldest first, without a last one cut off by a crash."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _plain(value):
    """A Python number, None for what is not finite, or a list of them; 6 digits."""
    if isinstance(value, int):
        return value
    array = np.asarray(value)
    if array.ndim:
        return [_plain(v) for v in array]
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    return float(f"{array:.6g}") if math.isfinite(array) else None
