"""Dialogues as text, by the Jinja template that comes with a published model.

Templates are programs of others: they run in a process of their own, see chat_sandbox.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from gt_jax.data import chat_sandbox
from gt_jax.data.base import Tokenizer, special_names
from gt_jax.errors import InputError, one_line

SECONDS = 5  # of computing, to render a dialogue
_END = "\ue000end of the last message\ue000 "  # private characters, which no text has


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
    named = getattr(tokenizer, "names", None)
    names: dict[str, Any] = special_names(tokenizer) if named is None else dict(named)
    # Templates may ask whether there are tools: as transformers, always a value.
    names |= {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    if continue_final and messages:
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + _END}

    def render(told):
        text = _render(source, names | {"messages": told})
        if not continue_final:
            return text
        before, end, after = text.rpartition(_END.strip())
        if not end:
            raise ValueError("it leaves out the last message, which shall be continued")
        return before if after.startswith(" ") else before.rstrip()  # a template may trim messages

    try:
        return render(messages)
    except chat_sandbox.Limit as error:
        raise InputError(f"the chat template {error}") from error
    except Exception:  # perhaps for a system prompt: as HFLM, without it
        try:
            return render([message for message in messages if message.get("role") != "system"])
        except Exception as error:
            said = one_line(error, 200)
            raise InputError(f"the chat template refuses this dialogue ({said})") from error


_alone = threading.Lock()
_process: subprocess.Popen | None = None  # of the sandbox; it serves one dialogue after the other


def _render(source: str, names: dict[str, Any]) -> str:
    """What the sandbox makes of a template.

    Raises:
        chat_sandbox.Limit: it takes too much time or memory, or makes too long a text.
        ValueError: it is wrong, or refuses the dialogue.
    """
    asked = json.dumps({"source": source, "names": names, "seconds": SECONDS}).encode() + b"\n"
    with _alone:
        child = _started()
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: no answer comes
                child.stdin.write(asked)
                child.stdin.flush()
            answer = child.stdout.readline()
        except BaseException:  # Ctrl-C: its answer would be taken for the next dialogue's
            child.kill()
            raise
        if not answer:
            late = child.wait() == -getattr(signal, "SIGPROF", 0)
            raise chat_sandbox.Limit(
                f"takes longer than {SECONDS} seconds" if late else "ended its process"
            )
    said = json.loads(answer)
    if "limit" in said:
        raise chat_sandbox.Limit(said["limit"])
    if "error" in said:
        raise ValueError(said["error"])
    return said["text"]


def _started() -> subprocess.Popen:
    """The sandbox's process, anew where there is none or it has ended."""
    global _process
    if _process is None or _process.poll() is not None:
        command = [sys.executable, "-P", chat_sandbox.__file__]
        pipe = subprocess.PIPE
        _process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=os.environ
        )
    return _process
