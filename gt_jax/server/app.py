"""The ASGI application: a body becomes an Ask, and a Worker's deltas become OpenAI's JSON.

POST /v1/completions and /v1/chat/completions, GET /v1/models, /v1/models/NAME and /health.

Every request has its own limits. When a request fails or its client leaves, the others continue.
"""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence

from gt_jax.errors import InputError
from gt_jax.generation import Worker
from gt_jax.models import LanguageModel
from gt_jax.server import answers, chat, completions
from gt_jax.server.access import guard

ENDPOINTS = {  # path -> what reads a body, what makes the answer
    "/v1/completions": (completions.parse, completions.Answer),
    "/v1/chat/completions": (chat.parse, chat.Answer),
}
LOCAL_HOSTS = ("127.0.0.1", "localhost")
BODY_BYTES, CLIENTS = 2**20, 256  # at most; each choice of an answer counts as a client
BODY_SECONDS = 20  # for a body to arrive
TYPES = {429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error"}


def make_app(
    worker: Worker,
    model: LanguageModel,
    *,
    name: str,
    max_tokens: int,
    seconds: float,
    hosts: Sequence[str] = LOCAL_HOSTS,
    api_key: str | None = None,
    body_seconds: float | None = None,
) -> Callable:
    """The ASGI application that answers for a model.

    Args:
        worker: a `gt_jax.generation.Worker` for the model.
        model: requests are checked against it.
        name: of the model, in answers.
        max_tokens: that a request may ask for.
        seconds: that a request may take.
        hosts: names of this host that requests may call it by.
        api_key: that requests must bring; None for none. See `access.guard`.
        body_seconds: that a body may take to arrive; BODY_SECONDS if None.
    """
    from starlette import applications, exceptions, middleware, requests, responses, routing
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def explain(error):
        """(OpenAI's error object, HTTP status)."""
        code = {InputError: 400, TimeoutError: 504}.get(type(error), 500)
        code = 400 if isinstance(error, InputError) else code
        text = f"not done after {seconds} seconds" if code == 504 else str(error)
        code, text = getattr(error, "status_code", code), getattr(error, "detail", text)
        kind = TYPES.get(code, "server_error" if code >= 500 else "invalid_request_error")
        about = {
            "message": text,
            "type": kind,
            "param": (getattr(error, "field", None) or "")[:64] or None,
        }
        return {"error": about | {"code": code}}, code

    def json_response(content, status=200):
        return responses.Response(json.dumps(content), status, media_type="application/json")

    async def read_body(http):
        _check_headers(http.headers, exceptions.HTTPException)
        data = b""
        try:
            async with asyncio.timeout(BODY_SECONDS if body_seconds is None else body_seconds):
                async for part in http.stream():
                    data += part
                    if len(data) > BODY_BYTES:
                        raise exceptions.HTTPException(413, f"the body exceeds {BODY_BYTES} bytes")
        except TimeoutError as error:
            raise exceptions.HTTPException(408, "the body did not arrive in time") from error
        return data

    token_text = functools.cache(functools.partial(answers.token_text, worker.tokenizer))
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gt_jax"}

    async def models(http):
        if http.path_params.get("name", name) != name:
            raise exceptions.HTTPException(404, f"the model here is {name!r}; see /v1/models")
        one = "name" in http.path_params
        return json_response(about if one else {"object": "list", "data": [about]})

    async def health(http):
        return json_response({"status": "ok"})

    async def complete(http):
        parse, answer_class = ENDPOINTS[http.url.path]
        try:
            data = await read_body(http)
        except requests.ClientDisconnect:
            return responses.Response(status_code=499)
        ask = await asyncio.to_thread(parse, data, model, worker.tokenizer, max_tokens)

        async def answer(scope, receive, send):
            if len(worker.clients) + len(ask.requests) > CLIENTS:
                raise exceptions.HTTPException(429, "too many requests are under way; try later")
            objects = answer_class(ask, worker.tokenizer, name, token_text)
            async with _noted(scope, objects), worker.deltas(ask.requests, seconds) as deltas:
                if ask.stream:
                    events = responses.StreamingResponse(
                        _events(objects, deltas, explain), media_type="text/event-stream"
                    )
                    work = events.stream_response(send)
                else:
                    work = _whole(objects, deltas)
                whole = await _while_connected(work, receive)
                if whole is not None:
                    await json_response(whole)(scope, receive, send)

        return answer

    failures = (exceptions.HTTPException, InputError, TimeoutError, RuntimeError, Exception)
    fail = lambda _, error: json_response(*explain(error))
    routes = [routing.Route(path, complete, methods=["POST"]) for path in ENDPOINTS]
    routes += [routing.Route(path, models) for path in ("/v1/models", "/v1/models/{name}")]
    app = applications.Starlette(
        routes=[*routes, routing.Route("/health", health)],
        middleware=[middleware.Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers=dict.fromkeys(failures, fail),
    )
    return guard(app, api_key)


@contextlib.asynccontextmanager
async def _noted(scope, objects):
    """Leaves for the log what was read and drawn, also when the client has left."""
    try:
        yield
    finally:
        usage = objects.usage
        read, drawn = usage["prompt_tokens"], usage["completion_tokens"]
        scope["gt_jax.about"] = f"{read} tokens read, {drawn} drawn"


def _check_headers(headers, refuse):
    """Raise refuse(status, message) for a body that is not JSON in UTF-8, or too long."""
    # The type keeps a page in a browser from asking unnoticed.
    kind, *parameters = headers.get("content-type", "").split(";")
    if kind.strip().lower() != "application/json":
        raise refuse(415, "the Content-Type must be application/json")
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        charset = value.strip().strip('"').lower()
        if key.strip().lower() == "charset" and charset not in ("utf-8", "utf8", "us-ascii"):
            raise refuse(415, f"the charset must be utf-8, not {charset[:40]!r}")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise refuse(415, "a Content-Encoding is not supported; send the body as it is")
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > BODY_BYTES:
        raise refuse(413, f"the body exceeds {BODY_BYTES} bytes")


async def _whole(objects, deltas):
    return objects.whole([delta async for delta in deltas])


async def _events(objects, deltas, explain):
    """Server-sent events of a stream; an error comes just before [DONE]."""
    say = lambda content: f"data: {json.dumps(content)}\n\n"
    try:
        async for delta in deltas:
            for content in objects.chunks(delta):
                yield say(content)
    except Exception as error:
        yield say(explain(error)[0])
    yield "data: [DONE]\n\n"


async def _while_connected(work, receive):
    """The result of a coroutine; None if the client leaves first, which cancels the coroutine."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
