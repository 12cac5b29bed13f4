"""Says that a step takes long while it does: a stuck network or disk shows before anyone waits."""

import collections
import statistics
import threading
import time
from collections.abc import Callable

TIMES = 10  # the median of the last steps
_LAST, _LEAST = 50, 5  # steps
_SECONDS = 1.0  # steps shorter than that are never late: the machine's own noise is larger


class Watchdog:
    """Says a line when a step takes 10 times the median of the last ones. A context manager."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        """Args:
        say: shows a line; called in a thread of its own.
        clock: in seconds.
        """
        self._say, self._clock = say, clock
        self._seconds = collections.deque(maxlen=_LAST)
        self._since: float | None = None  # None while nothing is timed
        self._step, self._said = 0, 0
        self._over = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def begin(self, step: int) -> None:
        """A step begins, and with it ends the one before."""
        now = self._clock()
        if self._since is not None:
            self._seconds.append(now - self._since)
        self._step, self._since = step, now

    def pause(self) -> None:
        """Until the next step begins, nothing is timed: the run evaluates, saves or samples."""
        self._since = None

    def look(self) -> None:
        """Say that the step under way is late, once, if it is."""
        since, step = self._since, self._step
        if since is None or step == self._said or len(self._seconds) < _LEAST:
            return
        seconds, median = self._clock() - since, statistics.median(list(self._seconds))
        if seconds > max(TIMES * median, _SECONDS):
            self._said = step
            self._say(f"step {step} takes {seconds:.1f} s so far, the median is {median:.3g} s")

    def _watch(self):
        while not self._over.wait(0.25):
            self.look()
