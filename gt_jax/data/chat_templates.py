"""Dialogues as text, by the Jinja template that comes with a published model.

Templates are programs of others. They run in Jinja's sandbox, as in transformers, and within limits
of time and size too: the sandbox alone lets `{% for %}` count to 10^10.
"""

import contextlib
import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError, one_line

SECONDS = 5  # to render a dialogue
TEMPLATE_CHARACTERS, TEXT_CHARACTERS = 2**20, 2**23  # of a template, of any text that it makes
_END = "\ue000end of the last message\ue000 "  # private characters, which no text has
_WIDTH = 1000  # of numbers that filters and operators take


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool = True,
    *,
    continue_final: bool = False,
) -> str:
    """A dialogue in the form of the tokenizer's template.

    Args:
        messages: each {"role": ..., "content": ...}.
        add_generation_prompt: whether the text ends with the beginning of the model's answer.
        continue_final: whether the text ends with the last message, for the model to continue it,
            without what the template puts after a message.

    Raises:
        InputError: no template, or one that refuses the dialogue, is wrong, or takes too long.
    """
    source = getattr(tokenizer, "chat_template", None)
    if source is None:
        raise InputError(
            "the tokenizer of this model has no template of dialogues (chat_template in "
            "tokenizer_config.json); send it plain text"
        )
    names: dict[str, Any] = {
        f"{name}_token": tokenizer.token_text(getattr(tokenizer.special, name))
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer.special, name) is not None
    }
    names["add_generation_prompt"] = add_generation_prompt
    messages = list(messages)
    if continue_final and messages:
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + _END}

    def render(told):
        text = _render(source, messages=told, **names)
        if not continue_final:
            return text
        before, end, after = text.rpartition(_END.strip())
        if not end:
            raise ValueError("it leaves out the last message, which shall be continued")
        return before if after.startswith(" ") else before.rstrip()  # a template may trim messages

    try:
        return render(messages)
    except _Limit as error:
        raise InputError(f"the chat template {error}") from error
    except Exception:  # perhaps for a system prompt: as HFLM, without it
        try:
            return render([message for message in messages if message.get("role") != "system"])
        except Exception as error:
            said = one_line(error, 200)
            raise InputError(f"the chat template refuses this dialogue ({said})") from error


class _Limit(Exception):
    """A template that takes too long, or makes too long a text."""


def _render(source, **names):
    if len(source) > TEMPLATE_CHARACTERS:
        raise _Limit(f"has {len(source)} characters; at most {TEMPLATE_CHARACTERS} are read")
    template, shown, length = _compile(source), [], 0
    with _limited():
        for text in template.generate(**names):
            shown.append(text)
            length += len(text)
            if length > TEXT_CHARACTERS:
                raise _Limit(f"writes more than {TEXT_CHARACTERS} characters")
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
                raise _Limit(f"makes a text of more than {TEXT_CHARACTERS} characters")
            if operator == "**" and any(abs(n) > _WIDTH for n in numbers):
                raise _Limit(f"raises numbers above {_WIDTH} to a power")
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
    """Raise _Limit where a text would be padded to a great width."""
    if isinstance(text, str) and (
        any(isinstance(x, int) and x > _WIDTH for x in values)
        or re.search(r"[%:.]\D{0,3}\d{5}", text)
    ):
        raise _Limit(f"pads a text to more than {_WIDTH} characters")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise _Limit in this thread when the time is over, or a function makes too long a text.

    Python calls the trace function at every line, also in loops that write nothing.
    """
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def trace(frame, event, arg):
        if time.monotonic() > end:
            raise _Limit(f"takes longer than {SECONDS} seconds")
        if event == "return" and isinstance(arg, str) and len(arg) > TEXT_CHARACTERS:
            raise _Limit(f"makes a text of more than {TEXT_CHARACTERS} characters")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
