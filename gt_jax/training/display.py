"""What a run shows while it trains: its speed, and a progress bar or plain lines.

No output ends a run: what a console cannot show is escaped, and what nobody reads is dropped.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from gt_jax.training import hosts

_closed = None  # the standard output whose reader has left


def say(text: str) -> None:
    """Print a line. Output that cannot be written is dropped, now and from now on.

    Of several processes the first one speaks for all.
    """
    if hosts.is_first():
        with _dropping():
            print(printable(text), flush=True)


def printable(text: str) -> str:
    """The text with escapes for the characters that standard output cannot encode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def reader_left() -> bool:
    """Whether standard output was a pipe whose reader closed it, as `| head` does."""
    return _closed is sys.stdout


@contextlib.contextmanager
def _dropping():
    global _closed
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _closed = sys.stdout
        with contextlib.suppress(OSError, ValueError):  # What is buffered would fail at the exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class Display:
    """A progress bar on a terminal, plain lines everywhere else; a context manager.

    Begins with "compiling", on a terminal with the seconds since.
    """

    def __init__(self, *, start: int, steps: int):
        self._steps = steps
        self._progress = None
        if sys.stdout.isatty() and hosts.is_first():
            columns = (  # of 80 characters the numbers take most; they wrap, and nothing is cut
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=10),
                TextColumn("{task.description}", table_column=Column(no_wrap=False)),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(highlight=False))
            self._task = self._progress.add_task("compiling", total=steps, completed=start)

    def __enter__(self):
        if self._progress:
            with _dropping():
                self._progress.start()
        else:
            say("compiling")
        return self

    def __exit__(self, *_):
        if self._progress:
            with _dropping():
                self._progress.stop()

    def wait_for(self, program: Future, began: float) -> None:
        """Say "compiling" until a program is ready, then after how long it was.

        Args:
            program: from `gt_jax.compilation.compile_side_by_side`.
            began: when the run did, as time.perf_counter() gives it.

        Raises:
            Exception: what lowering or compiling raised.
        """
        program.result()
        ready = f"compiled {time.perf_counter() - began:.0f} s after the start"
        if self._progress:
            self._progress.update(self._task, description=ready)
        else:
            say(ready)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._progress:
            with _dropping():
                self._progress.console.print(printable(text), markup=False, soft_wrap=True)
        else:
            say(text)

    def numbers(self, step: int, text: str) -> None:
        """Show the numbers after `step` steps."""
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        else:
            say(f"step {step}/{self._steps}  {text}")


class Speed:
    """Tokens per second of training alone, without compiling, evaluating, sampling or writing."""

    def __init__(self, tokens_per_step: int, *, start: int):
        self._tokens = tokens_per_step
        self._first = self._last = start + 1  # This step compiles; the clock starts at its end.
        self._seconds = self._seconds_before = 0.0
        self._since = None

    def begin(self, numbers: Mapping[str, Any]) -> None:
        """A step is on its way. If it is the first, wait for its numbers and start the clock."""
        if self._since is None:
            jax.block_until_ready(numbers)
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self, pending: Any) -> Iterator[None]:
        """Stop the clock once `pending` arrays are computed, for as long as the context lasts."""
        jax.block_until_ready(pending)
        self._read()
        yield
        if self._since is not None:
            self._since = time.perf_counter()

    def rewind(self, start: int) -> None:
        """Continue from the end of an earlier step: the next one is timed anew."""
        self.__init__(self._tokens, start=start)

    def latest(self, step: int) -> float | None:
        """Tokens per second between the last call and the end of `step`, which is now.

        None at the first step, whose seconds are those of compiling.
        """
        self._read()
        steps, seconds = step - self._last, self._seconds - self._seconds_before
        self._last, self._seconds_before = step, self._seconds
        return self._tokens * steps / seconds if steps > 0 and seconds else None

    def overall(self, step: int) -> float | None:
        """Tokens per second up to the last pause, at the end of `step`; None for a single step."""
        steps = step - self._first
        return self._tokens * steps / self._seconds if steps > 0 and self._seconds else None

    def _read(self):
        if self._since is None:  # no step yet
            return
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
