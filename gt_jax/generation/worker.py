"""Requests of many clients that come at any time, drawn in one batch by a thread of its own."""

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator

from gt_jax.generation.engine import Piece, Request, work_off


class Worker:
    """Works through requests of several asyncio clients; `clients` are those it has."""

    def __init__(self, model, params, tokenizer, rows):
        """Args as in `stream`."""
        self._model, self._options = (model, params), {"tokenizer": tokenizer, "rows": rows}
        self._queue, self._some, self._gone = deque(), threading.Event(), set()
        self._numbers, self.clients = itertools.count(), {}
        threading.Thread(target=self._run, daemon=True).start()

    async def pieces(self, request: Request, seconds: float) -> AsyncIterator[Piece]:
        """Pieces of one request, a checked one, as they come. Closing this drops the request.

        Raises:
            TimeoutError: it takes longer than so many seconds.
            RuntimeError: generation failed, for every client.
        """
        loop, arrived, number = asyncio.get_running_loop(), asyncio.Queue(), next(self._numbers)
        end, piece = loop.time() + seconds, None
        self.clients[number] = loop, arrived
        self._queue.append((number, request))
        self._some.set()
        try:
            while not (piece and piece.reason):
                piece = await asyncio.wait_for(arrived.get(), max(0, end - loop.time()))
                if isinstance(piece, Exception):
                    raise RuntimeError(f"generation failed: {piece}") from piece
                yield piece
        finally:
            self._gone.add(number)
            del self.clients[number]

    def _run(self):
        while self._some.wait():
            self._some.clear()
            try:
                for piece in work_off(
                    *self._model, self._queue, dropped=self._gone, **self._options
                ):
                    self._tell(piece.index, piece)
                self._gone.clear()
            except Exception as error:  # whatever it is, nobody shall wait in vain
                self._queue.clear()
                for number in list(self.clients):
                    self._tell(number, error)

    def _tell(self, number, news):
        with contextlib.suppress(KeyError, RuntimeError):  # gone, or their loop is closed
            loop, arrived = self.clients[number]
            loop.call_soon_threadsafe(arrived.put_nowait, news)
