"""Around the application: who may call it, a name for every request, and a line in the log."""

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

OPEN_PATHS = ("/health",)  # for everybody, so that a machine's supervisor needs no key
ID_HEADER = "x-request-id"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")

log = logging.getLogger("gt_jax.server")


def guard(app: Callable, api_key: str | None = None) -> Callable:
    """The ASGI application `app` behind a key, with request ids and a log.

    A request keeps the X-Request-Id that it brings, if that is 1 to 64 letters, digits and ._:- ,
    or gets one; the answer has it too.

    Args:
        app: may put a text into scope["gt_jax.about"], for the log.
        api_key: that every request must bring as `Authorization: Bearer KEY`, but for /health;
            None lets everybody in.
    """
    digest = None if api_key is None else _digest(api_key.encode())

    async def guarded(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(ID_HEADER.encode(), b"")
        known = _GIVEN_ID.fullmatch(given)
        name = given.decode() if known else f"req-{secrets.token_hex(8)}"
        began, status = time.monotonic(), 499  # nobody was there to take an answer

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (ID_HEADER.encode(), name.encode())
                message = message | {"headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            if digest and scope["path"] not in OPEN_PATHS and not _knows(headers, digest):
                return await _refuse(send_with_id)
            return await app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            about = " " + scope["gt_jax.about"] if "gt_jax.about" in scope else ""
            path = scope["path"][:100].encode("unicode_escape").decode()
            log.info("%s %s %s %d %.3f s%s", name, scope["method"], path, status, seconds, about)

    return guarded


def _digest(key: bytes) -> bytes:
    """As long for every key, so that comparing takes as long too."""
    return hashlib.sha256(key).digest()


def _knows(headers, digest):
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return hmac.compare_digest(_digest(key.strip()), digest) and kind.lower() == b"bearer"


async def _refuse(send):
    error = {
        "message": "the API key is missing or wrong; send it as Authorization: Bearer KEY",
        "type": "authentication_error",
        "param": None,
        "code": 401,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
