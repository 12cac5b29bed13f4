"""What is looked at after every step: whether it was finite, and whether the loss spikes.

A step is looked at two steps later, so that the device never waits for the host, and so that all
processes of a run come to a decision at the same place.

A loss is a suspect if it is not finite or above

    median + train.rewind_mads * max(MAD, median / 1000)

of the last 100 losses that were none, once there are 20; MAD is their median absolute deviation.
After train.rewind_steps suspects in a row the run returns to its last checkpoint before the first
of them and continues with the data behind the last one, as Chowdhery et al. did by hand ("PaLM",
2022, section 5.1).
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gt_jax.config import Config
from gt_jax.data import Batch
from gt_jax.errors import InputError
from gt_jax.training import hosts
from gt_jax.training.display import say
from gt_jax.training.progress import Progress
from gt_jax.training.writer import Writer, newest_of_all

FOLDER = "nonfinite"  # of a run: batches that gave NaN or infinity
MOST_FILES = 10  # of a process
_WINDOW, _LEAST = 100, 20  # losses


class Spike(Exception):
    """The run is to return to a checkpoint from before `first`.

    Attributes:
        first, last: steps of the suspects.
        position: of the batches, behind the last suspect's.
    """

    def __init__(self, first: int, last: int, position: dict, said: str):
        super().__init__(said)
        self.first, self.last, self.position = first, last, position


class Guard:
    """Ends or rewinds a run that breaks down, and keeps the batches on which it did."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        *,
        workdir: Path,
        starts: Callable[[Mapping], np.ndarray],
        saved: Callable[[], list[int]],
        say: Callable[[str], None],
    ):
        """Args:
        config: uses train.max_nonfinite and train.rewind_*.
        progress: of the run; a checkpoint remembers in it what is known of the losses.
        workdir: of the run, shared by its processes.
        starts: position of the batches -> where the rows before it begin, see `Batches.starts`.
        saved: gives the steps of the checkpoints there are.
        say: shows a line.
        """
        self._saved = saved
        self._config, self._progress = config, progress
        self._workdir, self._starts, self._say = workdir, starts, say
        self._pending = collections.deque()

    def add(self, step: int, numbers: Mapping[str, Any], batch: Batch, position: dict) -> None:
        """Take in a step that may still be running.

        Args:
            step: its number.
            numbers: of the train step: loss and skipped_in_a_row [].
            batch: what it ran on.
            position: of the batches after it.

        Raises:
            InputError: the last train.max_nonfinite steps were not finite.
            Spike: the run is to be rewound.
        """
        numbers = {name: numbers[name] for name in ("skipped_in_a_row", "loss")}
        for x in numbers.values():
            x.copy_to_host_async()
        self._pending.append((step, numbers, batch, position))
        if len(self._pending) > 2:
            self._look(*self._pending.popleft())

    def finish(self) -> None:
        """Look at the steps not looked at yet. Raises as `add` does."""
        while self._pending:
            self._look(*self._pending.popleft())

    def _look(self, step, numbers, batch, position):
        count, limit = int(numbers["skipped_in_a_row"]), self._config.train.max_nonfinite
        if count == 1:
            self._say(self._keep(step, batch, position))
        if count >= limit:
            raise InputError(
                f"the last {count} steps were not finite in loss or gradient "
                f"(train.max_nonfinite={limit}); lower optim.lr={self._config.optim.lr}"
            )
        if self._config.train.rewind_mads:
            self._judge(step, float(numbers["loss"]), bool(count), position)

    def _keep(self, step, batch, position) -> str:
        """Write the batch of a step; a line about it."""
        said = f"step {step}: loss or gradient is not finite, the step is skipped"
        process = f"-process{hosts.number()}" if hosts.count() > 1 else ""
        folder = self._workdir / FOLDER
        path = folder / f"step{step}{process}.npz"
        if len(list(folder.glob(f"step*{process}.npz"))) >= MOST_FILES and not path.exists():
            return f"{said}; {folder} has {MOST_FILES} batches already, this one is not written"
        arrays: dict[str, Any] = {
            name: _own(x) for name, x in batch._asdict().items() if x is not None
        }
        try:
            folder.mkdir(exist_ok=True)
            np.savez_compressed(path, step=step, starts=self._starts(position), **arrays)
        except OSError as error:
            return f"{said}; its batch cannot be written ({error})"
        return f"{said}; its batch is {path}"

    def _judge(self, step, loss, skipped, position):
        """Raise Spike at the last of so many suspects in a row."""
        train, progress = self._config.train, self._progress
        if progress.rewinds >= train.rewind_most:
            return
        losses = progress.losses
        if len(losses) >= _LEAST:
            median = statistics.median(losses)
            deviation = statistics.median(abs(x - median) for x in losses)
            limit = median + train.rewind_mads * max(deviation, median / 1000)
            if skipped or not loss <= limit:
                progress.suspects += 1
                if progress.suspects < train.rewind_steps:
                    return
                first = step - progress.suspects + 1
                high = "not finite in loss or gradient" if skipped else f"{loss:.4f}"
                high += "" if skipped else f" above {limit:.4f}"
                said = f"spike of the loss in steps {first} to {step}: {high}"
                if min(self._saved(), default=first) < first:
                    raise Spike(first, step, position, said)
                self._say(f"{said}; there is no checkpoint from before, training continues")
        progress.suspects = 0
        if math.isfinite(loss):
            progress.losses = [*losses, loss][-_WINDOW:]


def rewind(
    config: Config, workdir: Path, writer: Writer, progress: Progress, spike: Spike
) -> tuple[Path, dict, Progress]:
    """Make a run's last checkpoint from before a spike its newest.

    Returns:
        The checkpoint, its `about` with the place in the text behind the spike, and the progress to
        continue with.
    """
    writer.drop_from(spike.first)
    folder, about = newest_of_all(workdir)
    assert folder is not None and about is not None, "the Guard saw one"
    back, done = int(folder.name), progress.rewinds + 1
    progress = dataclasses.replace(
        Progress.of_checkpoint(about, back), suspects=0, rewinds=done, rewound_from=spike.last
    )
    say(
        f"{spike}; back to step {back}, without the data of steps {back + 1} to {spike.last} "
        f"(rewind {done} of at most {config.train.rewind_most})"
    )
    return folder, about | {"batches": spike.position}, progress


def _own(x: jax.Array | np.ndarray) -> np.ndarray:
    """An array; of one over several processes, the rows that this one has, in their order."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    places = {}
    for shard in x.addressable_shards:
        bounds = tuple(index.indices(size)[:2] for index, size in zip(shard.index, x.shape))
        places[bounds] = np.asarray(shard.data)
    low = np.min([[start for start, _ in place] for place in places], axis=0)
    high = np.max([[stop for _, stop in place] for place in places], axis=0)
    whole = np.zeros(high - low, x.dtype)
    for place, data in places.items():
        whole[tuple(slice(a - o, b - o) for (a, b), o in zip(place, low))] = data
    return whole
