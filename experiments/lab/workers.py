"""Work that is prepared side by side, each in a process of its own, and measured one at a time."""

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from gt_jax.errors import InputError

PREPARING = 0.6  # of the time limit, after which what is not prepared is given up


class Work(NamedTuple):
    """Something to measure: functions of the same arguments, run in one process."""

    name: str
    prepare: Callable[..., None]
    measure: Callable[..., Any]
    arguments: tuple
    cards: int  # GPUs that the process sees
    first_card: int = 0  # the first of them


def run_all(
    works: Sequence[Work],
    *,
    here: bool = False,
    seconds: float = math.inf,
    each: Callable[[dict], None] = lambda found: None,
) -> dict:
    """name -> what was measured, or {"reason": why nothing was}.

    Each is printed as soon as it is there, should a later one end it all.

    Args:
        works: in the order in which they are measured.
        here: in threads of this process, where what is measured means nothing.
        seconds: in which all must end.
        each: called with what was measured so far, after every work.

    Raises:
        InputError: from a function of the works.
    """
    began, found = time.perf_counter(), {}
    with contextlib.ExitStack() as stack:
        waiting = []
        for work in works:
            worker = stack.enter_context(ThreadPoolExecutor(1) if here else _process(work))
            process = None if here else worker.submit(os.getpid)
            waiting.append((work, worker, process, worker.submit(work.prepare, *work.arguments)))

        def wait(future, process, share):
            """What a future returns, or why there is nothing; a process that is late ends."""
            left = None if math.isinf(seconds) else began + share * seconds - time.perf_counter()
            try:
                return future.result(left and max(left, 0))
            except TimeoutError:
                if process:
                    _kill(process)
                return {"reason": f"not ready after {share * seconds:.0f} s"}
            except InputError:
                raise
            except Exception as error:  # the others are measured nevertheless
                traceback.print_exc()
                return {"reason": in_a_line(error)}

        made = {work.name: wait(ready, pid, PREPARING) for work, _, pid, ready in waiting}
        print(f"prepared after {time.perf_counter() - began:.0f} s", flush=True)
        for work, worker, pid, _ in waiting:
            found[work.name] = made[work.name]
            if made[work.name] is None:
                found[work.name] = wait(_measuring(worker, work), pid, 1)
            print(f"{work.name}: {found[work.name]}", flush=True)
            each(found)
            worker.shutdown()  # and what it holds of the memory is free
    return found


def _measuring(worker, work) -> Future:
    """The future measure of a work, which fails too where its process has died meanwhile."""
    try:
        return worker.submit(work.measure, *work.arguments)
    except BrokenExecutor as error:
        failed = Future()
        failed.set_exception(error)
        return failed


def _kill(process: Future) -> None:
    """End a process, once it has started: else it would do all that it was given."""
    with contextlib.suppress(BrokenExecutor, ProcessLookupError):  # it ended by itself
        os.kill(process.result(), signal.SIGKILL)


def in_a_line(error: Exception) -> str:
    """What an error says first."""
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first[:200]}"


def _process(work):
    cards = range(work.first_card, work.first_card + work.cards)
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (cards,))


def _begin(cards):
    """Of a process: other GPUs are neither started nor take memory."""
    jax.config.update("jax_cuda_visible_devices", ",".join(map(str, cards)))
    gc.disable()  # tracing makes objects by the million and little garbage
