"""What a run shows while it trains: its speed, and a progress bar or plain lines."""

import contextlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """A progress bar on a terminal, plain lines everywhere else; a context manager."""

    def __init__(self, *, start: int, steps: int):
        self._steps = steps
        self._progress = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(highlight=False))
            self._task = self._progress.add_task("compiling", total=steps, completed=start)

    def __enter__(self):
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_):
        if self._progress:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._progress:
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def numbers(self, step: int, text: str) -> None:
        """Show the numbers after `step` steps."""
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        else:
            print(f"step {step}/{self._steps}  {text}", flush=True)


class Speed:
    """Tokens per second of training alone, without compiling, evaluating, sampling or writing."""

    def __init__(self, tokens_per_step: int):
        self._tokens = tokens_per_step
        self._steps = self._steps_before = 0
        self._seconds = self._seconds_before = 0.0
        self._since = None

    def count_step(self, numbers) -> None:
        """One more step is on its way. The first one compiles: wait for its numbers, then start."""
        if self._since is None:
            jax.block_until_ready(numbers)
            self._since = time.perf_counter()
        else:
            self._steps += 1

    @contextlib.contextmanager
    def paused(self, pending):
        """Stop the clock once `pending` arrays are computed, for as long as the context lasts."""
        jax.block_until_ready(pending)
        self._read()
        yield
        self._since = time.perf_counter()

    def latest(self) -> float:
        """Tokens per second since the last call; 0 before anything was counted."""
        self._read()
        steps, seconds = self._steps - self._steps_before, self._seconds - self._seconds_before
        self._steps_before, self._seconds_before = self._steps, self._seconds
        return self._tokens * steps / seconds if seconds else 0.0

    def overall(self) -> float:
        """Tokens per second up to the last pause."""
        return self._tokens * self._steps / self._seconds if self._seconds else 0.0

    def _read(self):
        if self._since is not None:
            now = time.perf_counter()
            self._seconds += now - self._since
            self._since = now
