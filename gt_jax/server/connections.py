"""A uvicorn server that closes connections on which nothing arrives, or nothing leaves, in time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an optional package, imported by who serves
    import uvicorn

HEAD_SECONDS = 10  # for a request's headers to arrive, from the connection or the answer before on
STOP_SECONDS = 30


def make_server(
    app: Callable,
    *,
    host: str,
    port: int,
    request_seconds: float,
    head_seconds: float = HEAD_SECONDS,
    stop_seconds: int = STOP_SECONDS,
    **options: Any,
) -> "uvicorn.Server":
    """A uvicorn.Server for `app`, ready to `run()`.

    Args:
        app: of `make_app`.
        host, port: where to listen.
        request_seconds: the longest time from a request's headers to the end of its answer; it
            must exceed the application's own limits for body and answer. A client that does not
            read its answer is cut off after it.
        head_seconds: for a request's headers to arrive.
        stop_seconds: that requests under way may still take after SIGTERM or SIGINT, while no new
            ones are taken.
        **options: of uvicorn.Config.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        """H11Protocol with one timer: for the headers, then for the rest of the request.

        uvicorn's own runs after an answer only, and ends with the first byte that follows.
        """

        timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data):
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._start_timer()

        def on_response_complete(self):
            super().on_response_complete()
            self._start_timer()

        def connection_lost(self, exc):
            super().connection_lost(exc)
            if self.timer:
                self.timer.cancel()

        def _start_timer(self):
            if self.timer:
                self.timer.cancel()
            busy = self.cycle is not None and not self.cycle.response_complete
            self.timer = self.loop.call_later(
                request_seconds if busy else head_seconds, self._cut_off
            )

        def _cut_off(self):
            unsent = self.transport.get_write_buffer_size()
            self.transport.abort() if unsent else self.transport.close()

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=TimedProtocol,
        ws="none",
        access_log=False,
        timeout_graceful_shutdown=stop_seconds,
        **options,
    )
    return uvicorn.Server(config)
