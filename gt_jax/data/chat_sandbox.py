"""A process in which chat templates run: JSON lines in, one JSON line out for each.

Templates are programs of others. They run in Jinja's sandbox, as in transformers, which alone lets
`{% for %}` count to 10^10. So a template that loops or makes too long a text is stopped here, and
what no line of Python is called in (adding up lists, replacing texts) meets the process's limits:
of memory, and of time, which ends it a second after the time is up. Time is the processor's:
what else the machine does makes no template too long.

gt_jax.data.chat_templates runs this file alone, without the rest of gt_jax.
"""

import contextlib
import datetime
import functools
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

try:
    import resource
except ImportError:  # Windows, which has no alarm either: what Python calls is all that is bounded
    resource = None

TEMPLATE_CHARACTERS, TEXT_CHARACTERS = 2**20, 2**23  # of a template, of any text that it makes
MEMORY = 2**30  # bytes of the process
_WIDTH = 1000  # of numbers that filters and operators take


class Limit(Exception):
    """A template that takes too long, or makes too long a text."""


def render(source: str, seconds: float, names: dict[str, Any]) -> str:
    """The text of a template; raises Limit, and whatever Jinja does."""
    if len(source) > TEMPLATE_CHARACTERS:
        raise Limit(f"has {len(source)} characters; at most {TEMPLATE_CHARACTERS} are read")
    template, shown, length = _compile(source), [], 0
    with _limited(seconds):
        for text in template.generate(**names):
            shown.append(text)
            length += len(text)
            if length > TEXT_CHARACTERS:
                raise Limit(f"writes more than {TEXT_CHARACTERS} characters")
    return "".join(shown)


@functools.lru_cache(maxsize=4)
def _compile(source) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model said, for training; here it is plain text."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context, operator, left, right):
            size = sum(len(x) for x in (left, right) if isinstance(x, str | list | tuple))
            numbers = [x for x in (left, right) if isinstance(x, int | float)]
            if operator == "*" and any(size * n > TEXT_CHARACTERS for n in numbers):
                raise Limit(f"makes a text of more than {TEXT_CHARACTERS} characters")
            if operator == "**" and any(abs(n) > _WIDTH for n in numbers):
                raise Limit(f"raises numbers above {_WIDTH} to a power")
            if operator == "%":
                _check_widths(left)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):
            if getattr(value, "__name__", "") in ("format", "format_map"):
                _check_widths(getattr(value, "__self__", None))
            return super().wrap_str_format(value)

        def call(self, context, obj, *args, **named):  # methods: ljust, zfill, ...
            _check_widths(getattr(obj, "__self__", None), *args, *named.values())
            return super().call(context, obj, *args, **named)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    world = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    world.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(
        x, ensure_ascii=ensure_ascii, **options
    )
    for name in ("center", "format", "indent"):
        world.filters[name] = _with_checked_widths(world.filters[name])
    world.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return world.from_string(source)


def _with_checked_widths(function):
    def checked(*args, **named):
        _check_widths(*args, *named.values())
        return function(*args, **named)

    return checked


def _check_widths(text, *values):
    """Raise Limit where a text would be padded to a great width."""
    if isinstance(text, str) and (
        any(isinstance(x, int) and x > _WIDTH for x in values)
        or re.search(r"[%:.]\D{0,3}\d{5}", text)
    ):
        raise Limit(f"pads a text to more than {_WIDTH} characters")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise Limit in this thread when the time is over, or a function makes too long a text.

    Python calls the trace function at every line, also in loops that write nothing.
    """
    end, before = time.process_time() + seconds, sys.gettrace()

    def trace(frame, event, arg):
        if time.process_time() > end:
            raise Limit(f"takes longer than {seconds} seconds")
        if event == "return" and isinstance(arg, str) and len(arg) > TEXT_CHARACTERS:
            raise Limit(f"makes a text of more than {TEXT_CHARACTERS} characters")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    """The text of one dialogue, or why there is none."""
    try:
        return {"text": render(asked["source"], asked["seconds"], asked["names"])}
    except Limit as error:
        return {"limit": str(error)}
    except MemoryError:
        return {"limit": f"takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": str(error)[:2000]}


def main() -> None:
    """Answer until the input ends, as it does with the process that asks.

    A signal to end, which Ctrl-C and supervisors send to all processes of a server, is for the one
    that asks: it may finish what is under way.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if resource:
        with contextlib.suppress(ValueError, OSError):  # systems that have no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        _alarm(asked["seconds"] + 1)
        said = json.dumps(_answer(asked))
        _alarm(0)
        print(said, flush=True)


def _alarm(seconds: float) -> None:
    """Let SIGPROF end this process after some seconds of computing; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
