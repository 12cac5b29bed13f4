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

    def __init__(self, tokens_per_step: int, *, start: int):
        self._tokens = tokens_per_step
        self._first = self._last = start + 1  # This step compiles; the clock starts at its end.
        self._seconds = self._seconds_before = 0.0
        self._since = None

    def begin(self, numbers) -> None:
        """A step is on its way. If it is the first, wait for its numbers and start the clock."""
        if self._since is None:
            jax.block_until_ready(numbers)
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self, pending):
        """Stop the clock once `pending` arrays are computed, for as long as the context lasts."""
        jax.block_until_ready(pending)
        self._read()
        yield
        self._since = time.perf_counter()

    def latest(self, step: int) -> float:
        """Tokens per second between the last call and the end of `step`, which is now."""
        self._read()
        steps, seconds = step - self._last, self._seconds - self._seconds_before
        self._last, self._seconds_before = step, self._seconds
        return self._tokens * steps / seconds if seconds else 0.0

    def overall(self, step: int) -> float:
        """Tokens per second up to the last pause, at the end of `step`."""
        return self._tokens * (step - self._first) / self._seconds if self._seconds else 0.0

    def _read(self):
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
