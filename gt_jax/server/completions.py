"""OpenAI's JSON of a completion: the Request in a body, and the answer's objects."""

import json
import math
import secrets
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError, did_you_mean
from gt_jax.generation import Request
from gt_jax.generation.checks import SettingError, brief, check_surrogates
from gt_jax.generation.prompts import encode_prompt
from gt_jax.generation.requests import Delta, check_request
from gt_jax.generation.text import TextOut
from gt_jax.models import LanguageModel

PROMPT_TOKENS, STOPS, NAME_CHARACTERS = 2**16, 4, 1000  # at most
SETTINGS = {"max_tokens": (int,), "top_k": (int,), "seed": (int,), "stop": (str, list)}
SETTINGS |= dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float))
# Fields of OpenAI's API that are accepted at their neutral value alone: types and that value.
NEUTRAL = {
    "n": ((int,), 1),
    "best_of": ((int,), 1),
    "echo": ((bool,), False),
    "frequency_penalty": ((int, float), 0),
    "presence_penalty": ((int, float), 0),
    "logit_bias": ((dict,), {}),
    "suffix": ((str,), ""),
}
FIELDS = SETTINGS | {name: kinds for name, (kinds, _) in NEUTRAL.items()}
FIELDS |= {"prompt": (str, list), "stream": (bool,), "model": (str,), "user": (str,)}
FIELDS |= {"logprobs": (int,), "stream_options": (dict,)}
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
JSON_TYPES = {int: "a whole number", float: "a number", str: "a string", list: "an array"}
JSON_TYPES |= {bool: "true or false", dict: "an object", type(None): "null"}


class Ask(NamedTuple):
    """What a client asks: the request, whether to stream, with log-probabilities, with usage."""

    request: Request
    stream: bool
    logprobs: bool
    include_usage: bool


def parse(data: bytes, model: LanguageModel, tokenizer: Tokenizer, max_tokens: int) -> Ask:
    """The Ask in the bytes of a body.

    Args:
        max_tokens: that a request may ask for.

    Raises:
        InputError: the body is invalid; a SettingError if one field is at fault.
    """
    body = {name: value for name, value in _json_object(data).items() if value is not None}
    for name, value in body.items():
        _check_type(name, value)
    for name, (_, neutral) in NEUTRAL.items():
        if body.get(name, neutral) != neutral:
            raise SettingError(
                name, f"{name}={brief(body[name])} is not supported here; leave it at {neutral!r}"
            )
    for name in ("model", "user"):
        if len(body.get(name, "")) > NAME_CHARACTERS:
            raise SettingError(name, f"{name} must have at most {NAME_CHARACTERS} characters")
    if body.get("logprobs", 0) != 0:
        raise SettingError(
            "logprobs",
            f"logprobs={brief(body['logprobs'])} must be 0 here: the tokens drawn, without others",
        )
    settings = {"max_tokens": 16, "seed": secrets.randbits(31)}
    settings |= {name: body[name] for name in SETTINGS if name in body}
    if settings["max_tokens"] > max_tokens:
        raise SettingError(
            "max_tokens",
            f"max_tokens={brief(settings['max_tokens'])} must be at most {max_tokens}",
        )
    prompt = _prompt_ids(body.get("prompt", ""), tokenizer)
    stop = _stop_strings(settings.pop("stop", []))
    request = Request(prompt, **settings, stop=stop, stop_ids=tokenizer.stop_ids)
    check_request(model, request, tokenizer)
    streams = body.get("stream", False)
    usage = _include_usage(body.get("stream_options"), streams)
    return Ask(request, streams, "logprobs" in body, usage)


def _json_object(data):
    """The dict in a body of UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the body is not UTF-8 at byte {error.start}; send a JSON object in UTF-8"
        ) from error
    try:
        body = json.loads(
            text, object_pairs_hook=_no_name_twice, parse_int=_parse_int, parse_constant=float
        )
    except InputError:
        raise
    except RecursionError as error:
        raise InputError("the body must be a JSON object; it is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"the body must be a JSON object ({error})") from error
    if not isinstance(body, dict):
        raise InputError(f"the body must be a JSON object, not {JSON_TYPES[type(body)]}")
    return body


def _no_name_twice(pairs):
    names = set()
    for name, _ in pairs:
        if name in names:
            raise SettingError(name, f"{brief(name)} stands twice in the body; send it once")
        names.add(name)
    return dict(pairs)


def _parse_int(digits):
    """An int; an infinity where Python refuses so many digits, for the field's own error."""
    try:
        return int(digits)
    except ValueError:
        return math.copysign(math.inf, -1 if digits.startswith("-") else 1)


def _check_type(name, value):
    if name not in FIELDS:
        hint = did_you_mean(name[:100], FIELDS)
        shown = name if name.isidentifier() and name.isascii() and len(name) < 60 else brief(name)
        raise SettingError(name, f"{shown} is no field of a request here{hint}")
    if type(value) not in FIELDS[name]:
        wanted = " or ".join(JSON_TYPES[kind] for kind in FIELDS[name] if kind is not int)
        wanted = wanted or JSON_TYPES[int]
        raise SettingError(
            name, f"{name}={brief(value)} must be {wanted}, not {JSON_TYPES[type(value)]}"
        )
    if isinstance(value, str):
        check_surrogates(name, value)


def _stop_strings(stop):
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > STOPS or not all(isinstance(text, str) for text in stop):
        raise SettingError("stop", f"stop={brief(stop)} must be at most {STOPS} texts")
    return tuple(stop)


def _prompt_ids(prompt, tokenizer):
    """[T] ids of a text, of ids, or of a list of one of these."""
    if isinstance(prompt, list) and prompt and all(type(p) in (str, list) for p in prompt):
        if len(prompt) > 1:
            raise SettingError(
                "prompt", f"prompt holds {len(prompt)} prompts; send one in a request"
            )
        [prompt] = prompt
    if isinstance(prompt, str):
        try:
            prompt = encode_prompt(tokenizer, prompt, "prompt")
        except SettingError:
            raise
        except InputError as error:
            raise SettingError("prompt", str(error)) from error
    for odd in (p for p in prompt if isinstance(prompt, list) and type(p) is not int):
        raise SettingError("prompt", f"prompt holds {brief(odd)}, which is no token id")
    if len(prompt) > PROMPT_TOKENS:
        raise SettingError(
            "prompt", f"prompt of {len(prompt)} tokens must have at most {PROMPT_TOKENS}"
        )
    return prompt


def _include_usage(options, streams):
    if options is None:
        return False
    if not streams:
        raise SettingError("stream_options", "stream_options needs stream=true; leave it out")
    for name, value in options.items():
        if name not in STREAM_OPTIONS or type(value) not in (bool, type(None)):
            raise SettingError(
                "stream_options",
                f"stream_options={brief(options)} may hold include_usage, true or false",
            )
    return bool(options.get("include_usage"))


class Answer:
    """The objects of one answer: `choice` of a Delta, `whole` of all, `usage`, `chunk` of a stream.

    The log-probability of a token belongs to the text that the token completed; `text_offset` is
    the number of characters of the answer before that text.
    """

    def __init__(self, ask: Ask, tokenizer: Tokenizer, name: str):
        self._ask, self._drawn, self._offset = ask, 0, 0
        self._texts = TextOut(tokenizer, ask.request.prompt)
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._head |= {"created": int(time.time()), "model": name}

    def choice(self, delta: Delta) -> dict[str, Any]:
        """The choice object of one Delta, or of several joined."""
        self._drawn += len(delta.tokens)
        logprobs = self._logprobs(delta) if self._ask.logprobs else None
        choice = {"index": 0, "text": delta.text, "logprobs": logprobs}
        return choice | {"finish_reason": delta.reason}

    def _logprobs(self, delta):
        texts, offsets = [], []
        for token in delta.tokens:
            texts.append(self._texts.add([token])[0])
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [p if math.isfinite(p) else None for p in delta.log_probabilities],
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def usage(self) -> dict[str, int]:
        """What was read and drawn so far."""
        read = len(self._ask.request.prompt)
        total = {"total_tokens": read + self._drawn}
        return {"prompt_tokens": read, "completion_tokens": self._drawn} | total

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The object of a whole answer."""
        tokens = [token for delta in deltas for token in delta.tokens]
        values = [value for delta in deltas for value in delta.log_probabilities]
        text = "".join(delta.text for delta in deltas)
        joined = deltas[-1]._replace(tokens=tokens, log_probabilities=values, text=text)
        return self._head | {"choices": [self.choice(joined)], "usage": self.usage()}

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The objects of a stream for one Delta: two for the last one where usage is wanted."""
        absent = {"usage": None} if self._ask.include_usage else {}
        yield self._head | {"choices": [self.choice(delta)]} | absent
        if delta.reason and self._ask.include_usage:
            yield self._head | {"choices": [], "usage": self.usage()}
