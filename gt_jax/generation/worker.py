"""A thread that answers the requests of many clients in one batch, whenever they arrive."""

import asyncio
import atexit
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from gt_jax.data.base import Tokenizer
from gt_jax.generation.checks import check_whole
from gt_jax.generation.engine import MAX_ROWS, run_queue
from gt_jax.generation.requests import Delta, Failure, Request
from gt_jax.models import LanguageModel, Params


class Worker:
    """Works through requests of asyncio clients.

    Python waits for the thread at its exit, for no longer than a call of the device takes: a worker
    that nobody stopped drops its requests there.

    clients: request number -> the client's event loop and queue. tokenizer: makes the text.
    """

    def __init__(self, model: LanguageModel, params: Params, tokenizer: Tokenizer, rows: int):
        """Args as in `stream`."""
        rows = check_whole("rows", rows, 1, MAX_ROWS)
        self.tokenizer = tokenizer
        self._model, self._options = (model, params), {"tokenizer": tokenizer, "rows": rows}
        self._queue, self._some = deque(), threading.Event()
        self._numbers, self.clients = itertools.count(), {}
        self._ends = self._drops = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        # Python ends a daemon thread where it next takes Python's lock; in XLA's code that aborts.
        atexit.register(self._leave)

    def stop(self, seconds: float) -> None:
        """End the thread, once nothing is under way; wait at most so long for it."""
        self._ends = True
        self._some.set()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            atexit.unregister(self._leave)  # which keeps the model in memory

    @contextlib.asynccontextmanager
    async def deltas(
        self, requests: Sequence[Request], seconds: float
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """A context with an iterator of the Deltas of checked requests, as they come.

        Each Delta has the index of its request among `requests`. Leaving the context drops them
        all: their slots go to others before the next burst.

        Raises, out of the iterator:
            TimeoutError: they take longer than so many seconds together.
            RuntimeError: one of them failed, or the step that all requests share.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()
        numbers = {next(self._numbers): index for index in range(len(requests))}
        self.clients |= dict.fromkeys(numbers, (loop, arrived))
        try:
            self._queue.extend(zip(numbers, requests))
            self._some.set()
            yield _arriving(arrived, loop.time() + seconds, numbers)
        finally:
            for number in numbers:
                del self.clients[number]

    def _leave(self):
        self._drops = self._ends = True
        self._some.set()
        self._thread.join()

    def _is_wanted(self, number):
        return number in self.clients and not self._drops

    def _run(self):
        while self._some.wait() and not self._ends:
            self._some.clear()
            try:
                for news in run_queue(
                    *self._model, self._queue, wanted=self._is_wanted, **self._options
                ):
                    self._tell(news)
            except Exception as error:  # tell every client, so that none waits for ever
                self._queue.clear()
                for number in list(self.clients):
                    self._tell(Failure(number, error))

    def _tell(self, news):
        with contextlib.suppress(KeyError, RuntimeError):  # gone, or their loop is closed
            loop, arrived = self.clients[news.index]
            loop.call_soon_threadsafe(arrived.put_nowait, news)


async def _arriving(arrived, end, numbers) -> AsyncIterator[Delta]:
    """The Deltas that come through a queue, up to the last ones or to the loop's time `end`.

    numbers: of the requests that send them -> the index to give each.
    """
    left = set(numbers)
    while left:
        # Python 3.11's wait_for drops a cancellation that comes together with a result.
        async with asyncio.timeout_at(end):
            news = await arrived.get()
        if isinstance(news, Failure):
            raise RuntimeError(f"generation failed: {news.error}") from news.error
        yield news._replace(index=numbers[news.index])
        if news.reason:
            left.remove(news.index)
