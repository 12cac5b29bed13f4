"""Answer OpenAI's /v1/completions with a trained model, the requests of all clients in one batch.

    pip install -e ".[serve]"
    python -m gt_jax.serve --checkpoint=runs/gf_mh
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "ROMEO:", "max_tokens": 100, "stream": true}'

A request may hold prompt (a text, token ids, or a list of one of these), max_tokens, temperature,
top_p, top_k, min_p, repetition_penalty, seed, stop, stream, stream_options, logprobs (0: of the
tokens drawn), user, and OpenAI's other fields at the values that change nothing. Anything else is
an error that names the field. Bounds: 1 MiB of body, 65 536 tokens of prompt, 4 stop strings of
1024 characters, --max_tokens, --max_seconds. Connections are closed when headers take longer than
10 seconds or a body longer than 20.

Only programs on this machine reach the server unless --host says otherwise; it knows no keys.
"""

import functools
from pathlib import Path

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError
from gt_jax.generation import Worker
from gt_jax.server import make_app, make_server, parse
from gt_jax.server.app import BODY_SECONDS, LOCAL_HOSTS


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    number = functools.partial(absl_flags.DEFINE_integer, flag_values=flags, lower_bound=1)
    text = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    text("checkpoint", None, "A run, RUN@last, RUN@STEP, or one folder.")
    text("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all, whoever may call there.")
    number("port", 8000, "Port to listen at.", upper_bound=65535)
    number("rows", 8, "Requests drawn at once; the others wait.")
    number("max_tokens", 4096, "A request may ask for at most.")
    number("max_seconds", 300, "A request may take.")
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'{error}; install what serving needs: pip install -e ".[serve]"'
        ) from error
    from gt_jax.checkpoint import load

    model, params, tokenizer = load(flags.checkpoint, say=cli.note)
    read = functools.partial(parse, model=model, tokenizer=tokenizer, max_tokens=flags.max_tokens)
    hosts = LOCAL_HOSTS if flags.host == "127.0.0.1" else ("*",)
    worker, name = Worker(model, params, tokenizer, flags.rows), Path(flags.checkpoint).name
    app = make_app(worker, read, name=name, seconds=flags.max_seconds, hosts=hosts)
    longest = BODY_SECONDS + flags.max_seconds + 10
    make_server(app, host=flags.host, port=flags.port, request_seconds=longest).run()


if __name__ == "__main__":
    cli.run(main)
