"""Continue a text with a trained model.

    python -m gt_jax.generate --checkpoint=runs/gf_mh --prompt="ROMEO:" --max_tokens=300
    python -m gt_jax.generate --checkpoint=runs/gf_mh

Without --prompt it asks for one, continues it, and asks again: each line you type continues the
text so far, an empty one lets the model continue, Ctrl-C ends a reply and Ctrl-D the program.

The prompt is read in parallel. After it every token costs the same, however long the text is,
because the model remembers the text in a recurrent state of fixed size. --save_state writes that
state to a file, and --state continues from the file without reading the text again.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError
from gt_jax.generation import Request, load_context, prefill, save_context, stream
from gt_jax.generation.prompts import encode_prompt


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    text = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    whole = functools.partial(absl_flags.DEFINE_integer, flag_values=flags)
    real = functools.partial(absl_flags.DEFINE_float, flag_values=flags)
    text(
        "checkpoint",
        None,
        "RUN (its best), RUN@last, RUN@STEP, the mean RUN@STEP+STEP, or a folder.",
    )
    text("prompt", None, "Text to continue; without it you are asked.")
    whole("max_tokens", 256, "Tokens to add.")
    real("temperature", 1.0, "Above 1 flattens the probabilities; 0 takes the likeliest token.")
    whole("top_k", 0, "Draw among this many of the likeliest tokens; 0: among all.")
    real("top_p", 1.0, "Draw among the likeliest tokens that together have this probability.")
    real("min_p", 0.0, "Draw among tokens that are at least this share as likely as the likeliest.")
    real("repetition_penalty", 1.0, "Above 1: tokens seen before become less likely.")
    whole("seed", 0, "The same seed gives the same text.")
    absl_flags.DEFINE_multi_string(
        "stop", [], "End before this text; can be given several times.", flag_values=flags
    )
    text("state", None, "Continue from a file that --save_state wrote.")
    text("save_state", None, "File for the state after the prompt and the reply.")
    absl_flags.DEFINE_bool("stats", False, "Print the speed of each reply.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return

    from gt_jax.checkpoint import load

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    settings: dict[str, Any] = {name: flags[name].value for name in names}
    settings["stop"] = tuple(flags.stop)
    Request([], seed=flags.seed, **settings)  # a mistake is found before the long load
    model, params, tokenizer = load(flags.checkpoint, say=cli.note)
    settings["stop_ids"] = tokenizer.stop_ids
    context = load_context(flags.state, model, params) if flags.state else None
    speak = functools.partial(_speak, model, params, tokenizer, show_speed=flags.stats)

    unread = []  # what the model wrote since `context`
    if flags.prompt is not None:
        so_far = tokenizer.decode(context.waiting) if context else None
        ids = encode_prompt(tokenizer, flags.prompt, "--prompt", after=so_far)
        context, unread = speak(context, ids, echo=flags.prompt, seed=flags.seed, **settings)
    else:
        for turn, line in enumerate(_typed_lines()):
            so_far = tokenizer.decode([*(context.waiting if context else ()), *unread])
            separator = "\n" if line and so_far and not so_far.endswith("\n") else ""
            after = so_far if context else None
            try:
                ids = [*unread, *encode_prompt(tokenizer, separator + line, "prompt", after=after)]
                context, unread = speak(context, ids, seed=flags.seed + turn, **settings)
            except InputError as error:
                print("error:", error, file=sys.stderr)
            except KeyboardInterrupt:  # just before or after the reply
                print()
    if flags.save_state and context:
        save_context(flags.save_state, model, params, prefill(model, params, unread, context))


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard, with a history to go back in, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits and remembers; Windows has none
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()


def _speak(model, params, tokenizer, before, ids, *, echo="", show_speed, **settings):
    """Read ids after the context `before`, print `echo` and how the model continues.

    Returns:
        The context with the ids, and the list of ids written after it. Ctrl-C ends a reply; if it
        comes before the ids are read: `before`, and the ids.
    """
    context, written, prefilled = before, list(ids), None
    with contextlib.suppress(KeyboardInterrupt):
        start = functools.partial(stream, model, params, tokenizer=tokenizer, rows=1)
        if show_speed:  # a rehearsal, so that nothing is compiled while the clock runs
            next(start([Request(prefill(model, params, ids, before), **settings)]), None)
        began = time.perf_counter()
        context, written = jax.block_until_ready(prefill(model, params, ids, before)), []
        prefilled = time.perf_counter()
        deltas = start([Request(context, **settings)])
        for delta in deltas:  # compiling can say something, which must not end up in the text
            written += delta.tokens
            print(echo + delta.text, end="", flush=True)
            echo = ""
    ended = time.perf_counter()
    print(echo)
    if show_speed and prefilled is not None:
        known = before.length - len(before.waiting) if before else 0
        in_chunks = context.length - len(context.waiting) - known
        steps = len(context.waiting) - 1 + len(written)
        prefill_part = f"prefill: {in_chunks:,} tokens{_speed(in_chunks, prefilled - began)}"
        if not in_chunks:  # too short for a chunk
            prefill_part = f"prefill: none, {len(ids):,} prompt tokens are read while decoding"
        print(
            f"{prefill_part}; "
            f"decode: {steps:,} tokens ({len(written):,} new){_speed(steps, ended - prefilled)}",
            file=sys.stderr,
        )
    return context, written


def _speed(tokens: int, seconds: float) -> str:
    """The speed, and nothing where nothing was done."""
    return f", {tokens / seconds:,.0f} tokens/s" if tokens else ""


if __name__ == "__main__":
    cli.run(main)
