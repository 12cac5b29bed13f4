"""A server on a socket, in a thread, for tests of serving."""

import contextlib
import functools
import http.client
import json
import socket
import threading
import time

import pytest

from gt_jax import server
from gt_jax.generation import Request, Worker, complete

pytest.importorskip("uvicorn", reason="serving needs uvicorn")


class Serving:
    """A server on a port of its own."""

    def __init__(
        self, model, params, tokenizer, *, rows, request_seconds=60, head_seconds=10, **app
    ):
        self.engine = functools.partial(complete, model, params, tokenizer=tokenizer, rows=rows)
        self.engine([Request([1], max_tokens=5)])  # compiles what would take the first one's time
        self.worker = Worker(model, params, tokenizer, rows)
        app = {"name": "x", "max_tokens": 10**8, "seconds": 60} | app
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self._server = server.make_server(
            server.make_app(self.worker, model, **app),
            host="127.0.0.1",
            port=self.port,
            request_seconds=request_seconds,
            head_seconds=head_seconds,
            log_level="critical",
        )
        run = functools.partial(self._server.run, [self._socket])
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self):
        self._server.should_exit = True
        self._thread.join()
        self.worker.stop(10)

    def connect(self, data=b""):
        """A socket on which this was sent."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.sendall(data)
        return client

    def send(self, method, path, body=None, **headers):
        """(status, JSON, headers) of one request."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"} | headers
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

    def post(self, body, path="/v1/completions", **headers):
        """(status, JSON) of one request."""
        return self.send("POST", path, body, **headers)[:2]

    def text(self, **fields):
        status, answer = self.post({"prompt": "abc", "max_tokens": 5, "temperature": 0} | fields)
        assert status == 200, answer
        return answer["choices"][0]["text"]


def wait_for(condition, seconds=60):
    """Return once a condition holds, or fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def none_left(worker):
    """Wait until a worker knows no client: an answer arrives before the server has let it go."""
    wait_for(lambda: not worker.clients)
