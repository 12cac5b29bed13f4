"""OpenAI's /v1/chat/completions: a dialogue becomes a prompt by the model's own template."""

import math
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.data.chat_templates import render_chat
from gt_jax.errors import InputError
from gt_jax.generation.checks import SettingError, brief, check_surrogates, check_whole
from gt_jax.generation.requests import MOST_TOP_LOGPROBS, Delta, Request, check_request
from gt_jax.models import LanguageModel
from gt_jax.server import answers, bodies
from gt_jax.server.completions import prompt_ids, tokens_asked

MESSAGES, ROLE_CHARACTERS = 1024, 64  # at most
FIELDS = bodies.COMMON | {"messages": (list,), "logprobs": (bool,), "top_logprobs": (int,)}
FIELDS |= {"max_completion_tokens": (int,)}
NEUTRAL = bodies.NEUTRAL | {
    "tools": ((list,), ([],)),
    "tool_choice": ((str,), ("none", "auto")),
    "parallel_tool_calls": ((bool,), (True, False)),
    "response_format": ((dict,), ({"type": "text"},)),
    "modalities": ((list,), (["text"],)),
    "store": ((bool,), (False,)),
    "service_tier": ((str,), ("auto", "default")),
}


def parse(data: bytes, model: LanguageModel, tokenizer: Tokenizer, max_tokens: int) -> bodies.Ask:
    """The Ask in the bytes of a body.

    Args:
        max_tokens: that a request may ask for, and gets where it says nothing.

    Raises:
        InputError: the body is invalid, or the model has no template of dialogues; a SettingError
            if one field is at fault.
    """
    body = bodies.read_body(data, FIELDS, NEUTRAL)
    messages = _messages(body.get("messages", []))
    try:
        text = render_chat(tokenizer, messages)
    except InputError as error:
        raise SettingError("messages", str(error)) from error
    ids = prompt_ids(_ids(tokenizer, text), tokenizer, model, "messages")
    n, _ = bodies.choices_asked(body, [ids])
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    most = tokens_asked(body, model, len(ids), max_tokens, default=max_tokens, name=name)
    logprobs = _logprobs(body)
    more = {"max_tokens": most, "stop_ids": tokenizer.stop_ids, "top_logprobs": logprobs or 0}
    requests = [Request(ids, **more, **one) for one in bodies.sampling(body, n)]
    check_request(model, requests[0], tokenizer)
    usage = bodies.include_usage(body)
    return bodies.Ask(requests, n, n, body.get("stream", False), logprobs, usage)


def _ids(tokenizer, text):
    """A template writes the tokens that begin a text itself."""
    try:
        return tokenizer.encode(text).tolist()
    except InputError as error:
        raise SettingError("messages", str(error)) from error


def _logprobs(body) -> int | None:
    top = check_whole("top_logprobs", body.get("top_logprobs", 0), 0, MOST_TOP_LOGPROBS)
    if body.get("logprobs", False):
        return top
    if top:
        raise SettingError("top_logprobs", f"top_logprobs={top} needs logprobs=true")
    return None


def _messages(messages) -> list[dict[str, str]]:
    """The messages with their texts in one string each."""
    fault = lambda text: SettingError("messages", text)
    if not 1 <= len(messages) <= MESSAGES:
        raise fault(f"messages holds {len(messages)} messages; send 1 to {MESSAGES}")
    found = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise fault(f"{where}={brief(message)} must be an object with role and content")
        fields = {name: value for name, value in message.items() if value is not None}
        for name in fields.keys() - {"role", "content", "name"}:
            raise fault(f"{where} holds {brief(name)}; a message has role, content and name")
        fields["content"] = _content(fields.get("content", ""), where, fault)
        for name, value in fields.items():
            if not isinstance(value, str):
                raise fault(f"{where}.{name}={brief(value)} must be a string")
            check_surrogates("messages", value)
        if not 1 <= len(fields.get("role", "")) <= ROLE_CHARACTERS:
            raise fault(f"{where}.role must be a string of 1 to {ROLE_CHARACTERS} characters")
        found.append(fields)
    return found


def _content(content, where, fault):
    """A text, or the texts of parts joined."""
    if not isinstance(content, list):
        return content
    for part in content:
        text = isinstance(part, dict) and part.get("type") == "text"
        if not text or not isinstance(part.get("text"), str) or len(part) > 2:
            raise fault(f"{where}.content holds {brief(part)}; parts must be of type text")
    return "".join(part["text"] for part in content)


class Answer(answers.Answer):
    """The objects of one answer of /v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, delta: Delta, place: int, *, first: bool) -> dict[str, Any]:
        """The choice object of a request's joined Deltas."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = {"index": place, "message": message, "logprobs": self._logprobs(delta)}
        return choice | {"finish_reason": delta.reason}

    def chunk_choice(self, delta: Delta, place: int, *, first: bool) -> dict[str, Any]:
        """The choice object of one Delta in a stream."""
        news = {"role": "assistant"} if first else {}
        choice = {"index": place, "delta": news | {"content": delta.text}}
        return choice | {"logprobs": self._logprobs(delta), "finish_reason": delta.reason}

    def _logprobs(self, delta):
        if self.ask.logprobs is None:
            return None
        tops = delta.top or [{}] * len(delta.tokens)
        content = []
        for token, value, top in zip(delta.tokens, delta.log_probabilities, tops):
            others = [self._entry(*entry) for entry in top.items()]
            content.append(self._entry(token, value) | {"top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token, value):
        text, data = self.token_text(token)
        impossible = -9999.0  # OpenAI's number, where clients expect one
        value = value if math.isfinite(value) else impossible
        return {"token": text, "logprob": value, "bytes": list(data)}
