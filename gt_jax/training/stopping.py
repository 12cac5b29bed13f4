"""Ending a run early without losing work: signals, a closed output, no time left.

While there is nothing to lose (reading text, compiling the first step) a signal ends a program at
once. Later the loop sees it after the step, saves and leaves. A second one always ends it at once.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

from gt_jax.training import hosts

TIME_IS_UP = 75  # exit status after train.max_minutes: "try again later" in sysexits.h
CLOSED_OUTPUT = 128 + 13  # as a shell reports SIGPIPE, which Python ignores

_SIGNALS = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Interrupted(Exception):
    """Something that can be done again later was given up to stop sooner."""


class Stop:
    """Why a run should stop; false as long as it should not.

    Where several processes train together, what one of them is asked for counts for all, from the
    same `look` on.

    Attributes:
        vote: of several processes, a `hosts.Vote`; None where there is one.
        reason: for people, e.g. "SIGTERM"; the first one counts.
        status: the exit status of a program that stops for it: 128 + the number of a signal.
        work_to_lose: whether a signal waits for the loop to save.
    """

    def __init__(self):
        self.vote: Callable[[bool], bool] | None = None
        self._asked: tuple[str, int] | None = None  # reason and status
        self.reason: str | None = None
        self.status = 0
        self.work_to_lose = False

    def __bool__(self):
        return self.reason is not None

    def request(self, reason: str, status: int) -> None:
        """Ask for a stop; nothing happens if it has been asked for."""
        self._asked = self._asked or (reason, status)
        if self.vote is None:
            self.reason, self.status = self._asked

    def look(self) -> None:
        """A place that all processes come to; here they begin to stop if one was asked to."""
        if self or self.vote is None or not self.vote(self._asked is not None):
            return
        said = [json.loads(text) for text in hosts.gather(json.dumps(self._asked))]
        i = next(i for i, asked in enumerate(said) if asked)
        self.reason, self.status = f"{said[i][0]} in process {i}", said[i][1]

    def until(self, items: Iterable) -> Iterator:
        """The items, as long as nothing asks for a stop. Raises Interrupted then."""
        for item in items:
            self.look()
            if self:
                raise Interrupted
            yield item


@contextlib.contextmanager
def signals(stop: Stop, *, once: bool = True) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask for a stop.

    Signals that the process was started to ignore (nohup) stay ignored.

    Args:
        stop: to ask.
        once: whether a second signal acts as it usually does.
    """
    usual = {}

    def note(number, _):
        stop.request(signal.Signals(number).name, 128 + number)
        if once:
            signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():
        for number in filter(None, _SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                usual[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def program(stop: Stop) -> Iterator[None]:
    """`signals` for a program, which may end at once: without work to lose, or the second time.

    A thread sees to that, as Python's own handlers wait for a compilation to return.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        out_of, into = os.pipe()
        os.set_blocking(into, False)
        stack.callback(os.close, out_of)
        stack.enter_context(signals(stop, once=False))
        before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        watcher = threading.Thread(target=_watch, args=(out_of, stop), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(into)  # ends the watcher
            watcher.join()


def _watch(out_of: int, stop: Stop) -> None:
    noted = {int(number) for number in _SIGNALS if number}
    seen = 0
    while numbers := os.read(out_of, 64):
        for number in numbers:
            if number not in noted:
                continue
            seen += 1
            if seen > 1 or not stop.work_to_lose:
                name = signal.Signals(number).name
                lost = "again" if seen > 1 else "with nothing to save"
                _write(f"stopped by {name} {lost}; the same command continues the run\n")
                os._exit(128 + number)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, text.encode())
