"""Answer OpenAI's /v1/completions with a trained model, the requests of all clients in one batch.

    pip install -e ".[serve]"
    python -m gt_jax.serve --checkpoint=runs/gf_mh
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "ROMEO:", "max_tokens": 100, "stream": true}'

FIELDS are what a request may hold. Only programs on this machine reach the server unless --host
says otherwise; it knows no keys.
"""

import asyncio
import contextlib
import functools
import json
import secrets
import time
from pathlib import Path

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError, did_you_mean
from gt_jax.generate import encode_prompt
from gt_jax.generation import Request, Worker
from gt_jax.generation.engine import check

BODY_BYTES, PROMPT_TOKENS, CLIENTS = 2**20, 2**16, 64  # at most
SETTINGS = {"max_tokens": (int,), "top_k": (int,), "seed": (int,), "stop": (str, list)}
SETTINGS |= dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float))
FIELDS = SETTINGS | {"prompt": (str,), "stream": (bool,), "model": (str,), "user": (str,)}


def parse(data, model, tokenizer, max_tokens):
    """The Request in a JSON text, and whether to stream; InputError says what is wrong with it."""
    try:
        body = {name: value for name, value in json.loads(data).items() if value is not None}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"the body must be a JSON object ({error})") from error
    for name, value in body.items():
        if name not in FIELDS:
            raise InputError(f"{name} is no field of a request here{did_you_mean(name, FIELDS)}")
        if type(value) not in FIELDS[name]:
            wanted = " or ".join(kind.__name__ for kind in FIELDS[name])
            raise InputError(f"{name}={value!r} must be {wanted}, not {type(value).__name__}")
    settings = {"max_tokens": 16, "seed": secrets.randbits(31), "stop": []}
    settings |= {name: body[name] for name in SETTINGS if name in body}
    stop = [settings["stop"]] if isinstance(settings["stop"], str) else settings["stop"]
    if len(stop) > 4 or not all(isinstance(text, str) for text in stop):
        raise InputError(f"stop={stop!r} must be at most 4 texts")
    if settings["max_tokens"] > max_tokens:
        raise InputError(f"max_tokens={settings['max_tokens']} must be at most {max_tokens}")
    ids = encode_prompt(tokenizer, body.get("prompt", ""), "prompt")
    if len(ids) > PROMPT_TOKENS:
        raise InputError(f"prompt of {len(ids)} tokens must have at most {PROMPT_TOKENS}")
    request = Request(ids, **settings | {"stop": tuple(stop), "stop_ids": tokenizer.stop_ids})
    check(model, request, tokenizer)
    return request, body.get("stream", False)


def make_app(worker, parse, *, name, seconds, hosts=("127.0.0.1", "localhost")):
    """The ASGI application of a Worker, a parse(data), and the hosts' names that it answers to."""
    from starlette import applications, exceptions, middleware, responses, routing  # an extra's
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def explain(error):
        code = {InputError: 400, TimeoutError: 504}.get(type(error), 500)
        text = f"not done after {seconds} seconds" if code == 504 else str(error)
        code, text = getattr(error, "status_code", code), getattr(error, "detail", text)
        return {"error": {"message": text, "code": code}}, code

    def choices(text, reason):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {"choices": [choice]}

    async def completions(http):
        # The type keeps a page in a browser from asking unnoticed.
        if http.headers.get("content-type", "").split(";")[0] != "application/json":
            raise exceptions.HTTPException(415, "the Content-Type must be application/json")
        data = b""
        async for part in http.stream():
            data += part
            if len(data) > BODY_BYTES:
                raise exceptions.HTTPException(413, f"the body exceeds {BODY_BYTES} bytes")
        request, streams = await asyncio.to_thread(parse, data)
        if len(worker.clients) >= CLIENTS:
            raise exceptions.HTTPException(429, "too many requests are under way; try again later")
        pieces = worker.pieces(request, seconds)
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        head |= {"created": int(time.time()), "model": name}
        if streams:
            return responses.StreamingResponse(events(head, pieces), media_type="text/event-stream")
        pieces = [piece async for piece in pieces]
        read, drawn = len(request.prompt), sum(len(piece.tokens) for piece in pieces)
        usage = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
        whole = choices("".join(piece.text for piece in pieces), pieces[-1].reason)
        return responses.JSONResponse(head | whole | {"usage": usage})

    async def events(head, pieces):
        say = lambda content: f"data: {json.dumps(content)}\n\n"
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield say(head | choices(piece.text, piece.reason))
        except Exception as error:
            yield say(explain(error)[0])
        yield "data: [DONE]\n\n"

    failures = (exceptions.HTTPException, InputError, TimeoutError, Exception)
    fail = lambda _, error: responses.JSONResponse(*explain(error))
    return applications.Starlette(
        routes=[routing.Route("/v1/completions", completions, methods=["POST"])],
        middleware=[middleware.Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers=dict.fromkeys(failures, fail),
    )


def main(argv):
    flags = cli.new_flags()
    number = functools.partial(absl_flags.DEFINE_integer, flag_values=flags, lower_bound=1)
    text = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    text("checkpoint", None, "A run's workdir, or one checkpoint folder.")
    text("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all, whoever may call there.")
    number("port", 8000, "Port to listen at.")
    number("rows", 8, "Requests drawn at once; the others wait.")
    number("max_tokens", 4096, "A request may ask for at most.")
    number("max_seconds", 300, "A request may take.")
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return
    try:
        import uvicorn
    except ImportError as error:
        raise InputError(
            f'{error}; install what serving needs: pip install -e ".[serve]"'
        ) from error
    from gt_jax.training.checkpoint import load

    model, params, tokenizer = load(flags.checkpoint)
    read = functools.partial(parse, model=model, tokenizer=tokenizer, max_tokens=flags.max_tokens)
    hosts = {"hosts": ["*"]} if flags.host != "127.0.0.1" else {}
    worker, name = Worker(model, params, tokenizer, flags.rows), Path(flags.checkpoint).name
    app = make_app(worker, read, name=name, seconds=flags.max_seconds, **hosts)
    uvicorn.run(app, host=flags.host, port=flags.port)


if __name__ == "__main__":
    cli.run(main)
