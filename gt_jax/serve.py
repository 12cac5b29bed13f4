r"""Answer OpenAI's API with a trained model, the requests of all clients in one batch.

    pip install -e ".[serve]"
    python -m gt_jax.serve --checkpoint=runs/gf_mh
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"prompt": "ROMEO:", "max_tokens": 100, "stream": true}'

POST /v1/completions and, for models with a template of dialogues, /v1/chat/completions; GET
/v1/models and /health. What has to be compiled is compiled before the server listens.

A completion may hold prompt (a text, token ids, or a list of texts or of lists of ids), max_tokens,
n, best_of, echo, logprobs (0 to 20), temperature, top_p, top_k, min_p, repetition_penalty, seed,
stop, stream, stream_options and user. A chat has messages, max_completion_tokens, logprobs and
top_logprobs (0 to 20) instead of prompt, best_of, echo and logprobs. OpenAI's other fields are
taken at the values that change nothing. Anything else is an error that names the field.

Bounds: 1 MiB of body, 65 536 tokens of a prompt, 128 choices and 2^20 tokens of prompts in an
answer, 16 stop strings of 1024 characters, 1024 messages, --max_tokens, --max_seconds. Connections
are closed when headers take longer than 10 seconds or a body longer than 20.

Only programs on this machine reach the server unless --host says otherwise. With a key in the
environment's GT_JAX_API_KEY or in --api_key (which others on this machine can see), every request
but /health must bring `Authorization: Bearer KEY`. SIGTERM and Ctrl-C end the server: what runs is
finished first, within --stop_seconds.
"""

import functools
import logging
import os
import signal
import sys
import time
from pathlib import Path

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError
from gt_jax.generation import Request, Worker, complete
from gt_jax.server import make_app, make_server
from gt_jax.server.app import BODY_SECONDS, LOCAL_HOSTS
from gt_jax.server.connections import STOP_SECONDS

KEY_VARIABLE = "GT_JAX_API_KEY"


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    number = functools.partial(absl_flags.DEFINE_integer, flag_values=flags, lower_bound=1)
    text = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    text(
        "checkpoint",
        None,
        "RUN (its best), RUN@last, RUN@STEP, the mean RUN@STEP+STEP, or a folder.",
    )
    text(
        "host",
        "127.0.0.1",
        "Address to listen at; with 0.0.0.0 every machine that reaches this one may call.",
    )
    number("port", 8000, "Port to listen at.", upper_bound=65535)
    number("rows", 8, "Requests that are decoded at once; the others wait.")
    number("max_tokens", 4096, "The most tokens that a request may ask for.")
    number("max_seconds", 300, "The most seconds that a request may take.")
    number("stop_seconds", STOP_SECONDS, "Seconds for running requests to finish after SIGTERM.")
    text(
        "api_key",
        None,
        f"Key that requests must bring; better given in the environment as {KEY_VARIABLE}.",
    )
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error}; install what serving needs: pip install jinja2 starlette uvicorn"
        ) from error
    api_key = _checked_key(flags.api_key)
    from gt_jax.checkpoint import load

    model, params, tokenizer = load(flags.checkpoint, say=cli.note)
    hosts = LOCAL_HOSTS if flags.host == "127.0.0.1" else ("*",)
    began = time.monotonic()
    _warm_up(model, params, flags.rows)
    worker = Worker(model, params, tokenizer, flags.rows)
    name = Path(flags.checkpoint).resolve().name
    _log_to_stderr()
    print(f"{name}: compiled in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    app = make_app(
        worker,
        model,
        name=name,
        max_tokens=flags.max_tokens,
        seconds=flags.max_seconds,
        hosts=hosts,
        api_key=api_key,
    )
    server = make_server(
        app,
        host=flags.host,
        port=flags.port,
        request_seconds=BODY_SECONDS + flags.max_seconds + 10,
        stop_seconds=flags.stop_seconds,
    )
    # uvicorn raises the signal again when all is finished, which is an end without a fault.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.run()
    finally:
        worker.stop(seconds=10)


def _checked_key(given: str | None) -> str | None:
    """The key of the flag or the environment; None where neither is set."""
    key, source = given, "--api_key"
    if key is None:
        key, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if key is not None and (not key.isascii() or not key.isprintable() or key.strip() != key):
        raise InputError(f"{source} must be printable ASCII without spaces around it")
    if key == "":
        raise InputError(
            f"{source} is empty, which would let everybody in; set it, or leave it out"
        )
    return key


def _warm_up(model, params, rows) -> None:
    """Compile what most requests need: prefill of the smaller chunks, and both kinds of drawing."""
    length = min(1024 + 256 + 64 + 1, model.config.position_limit or 2**16)
    for prompt, top_k in (([0] * length, 0), ([0], 2)):
        complete(model, params, [Request(prompt, max_tokens=1, top_k=top_k)], rows=rows)


def _log_to_stderr() -> None:
    """A line for every request, with its id."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("gt_jax.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # other libraries' handlers would print each line once more


if __name__ == "__main__":
    cli.run(main)
