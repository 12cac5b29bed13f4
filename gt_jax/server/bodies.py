"""JSON bodies of requests: read, their fields checked, each error naming the field at fault."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gt_jax.errors import InputError, did_you_mean
from gt_jax.generation import Request
from gt_jax.generation.checks import SettingError, brief, check_surrogates, check_whole

STOPS, NAME_CHARACTERS = 16, 1000  # at most
CHOICES = 128  # of an answer, at most, those that best_of drops included
ALL_PROMPT_TOKENS = 2**20  # that all choices together read, at most
# Fields of OpenAI's API that are accepted at values alone that change nothing: types and values.
NEUTRAL = {
    "frequency_penalty": ((int, float), (0,)),
    "presence_penalty": ((int, float), (0,)),
    "logit_bias": ((dict,), ({},)),
}
SAMPLING = {"top_k": (int,), "seed": (int,), "stop": (str, list)}
SAMPLING |= dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float))
# Fields of every endpoint, with their types.
COMMON = SAMPLING | {"max_tokens": (int,), "stream": (bool,), "stream_options": (dict,)}
COMMON |= {"n": (int,), "model": (str,), "user": (str,)}
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
JSON_TYPES = {int: "a whole number", float: "a number", str: "a string", list: "an array"}
JSON_TYPES |= {bool: "true or false", dict: "an object", type(None): "null"}


class Echo(NamedTuple):
    """A prompt's text, to begin answers with; the first `hidden` tokens are no part of it."""

    text: str
    hidden: int


class Ask(NamedTuple):
    """What a client asks.

    requests: `best_of` for each prompt, one prompt after the other; `n` of them are answered.
    logprobs: how many of the likeliest tokens to name with each token; None for no logprobs.
    echo: an Echo of each prompt; None for answers alone.
    draws: False where the prompt alone is wanted: then what is drawn is left out.
    """

    requests: list[Request]
    n: int
    best_of: int
    stream: bool
    logprobs: int | None
    include_usage: bool
    echo: list[Echo] | None = None
    draws: bool = True


def read_body(
    data: bytes,
    fields: Mapping[str, tuple[type, ...]],
    neutral: Mapping[str, tuple[tuple[type, ...], tuple]],
) -> dict[str, Any]:
    """The fields of a body that are not null, types and neutral values checked.

    Args:
        data: UTF-8 of a JSON object.
        fields: the types of each field.
        neutral: of fields that only some values are accepted for: types, and these values.

    Raises:
        InputError: no JSON object; a SettingError if one field is at fault.
    """
    body = {name: value for name, value in _json_object(data).items() if value is not None}
    known = {**fields, **{name: kinds for name, (kinds, _) in neutral.items()}}
    for name, value in body.items():
        _check_type(name, value, known)
    for name, (_, values) in neutral.items():
        if name in body and body[name] not in values:
            wanted = " or ".join(map(repr, values))
            raise SettingError(
                name, f"{name}={brief(body[name])} is not supported here; leave it at {wanted}"
            )
        body.pop(name, None)
    for name in ("model", "user"):
        if len(body.get(name, "")) > NAME_CHARACTERS:
            raise SettingError(name, f"{name} must have at most {NAME_CHARACTERS} characters")
    return body


def choices_asked(body: Mapping[str, Any], prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """n and best_of of a body, so many that all prompts together stay within the bounds."""
    n = check_whole("n", body.get("n", 1), 1, CHOICES)
    best_of = check_whole("best_of", body.get("best_of", n), 1, CHOICES)
    if best_of < n:
        raise SettingError("best_of", f"best_of={best_of} must be at least n={n}")
    field = "best_of" if body.get("best_of", 1) > n else "n" if n > 1 else "prompt"
    if len(prompts) * best_of > CHOICES:
        raise SettingError(
            field, f"{len(prompts)} prompts of {best_of} choices each exceed {CHOICES} choices"
        )
    total = sum(map(len, prompts)) * best_of
    if total > ALL_PROMPT_TOKENS:
        raise SettingError(
            field, f"prompts of {total} tokens in all choices exceed {ALL_PROMPT_TOKENS}"
        )
    return n, best_of


def sampling(body: Mapping[str, Any], best_of: int) -> list[dict[str, Any]]:
    """The settings of each choice of a prompt; they differ by the seed."""
    settings = {name: body[name] for name in SAMPLING if name in body}
    stop = settings.get("stop", ())
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > STOPS or not all(isinstance(text, str) for text in stop):
        raise SettingError("stop", f"stop={brief(stop)} must be at most {STOPS} texts")
    settings["stop"] = tuple(stop)
    seed = settings.get("seed", secrets.randbits(31))
    check_whole("seed", seed, -(2**31), 2**31 - 1)
    wrapped = lambda seed: (seed + 2**31) % 2**32 - 2**31
    return [settings | {"seed": wrapped(seed + choice)} for choice in range(best_of)]


def include_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with the usage."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not body.get("stream", False):
        raise SettingError("stream_options", "stream_options needs stream=true; leave it out")
    for name, value in options.items():
        if name not in STREAM_OPTIONS or type(value) not in (bool, type(None)):
            raise SettingError(
                "stream_options",
                f"stream_options={brief(options)} may hold include_usage, true or false",
            )
    return bool(options.get("include_usage"))


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
    """An int; one of as many digits where Python refuses to read so many, for the field's error."""
    try:
        return int(digits)
    except ValueError:
        number = 10 ** (len(digits.lstrip("-")) - 1)
        return -number if digits.startswith("-") else number


def _check_type(name, value, known):
    if name not in known:
        hint = did_you_mean(name[:100], known)
        shown = name if name.isidentifier() and name.isascii() and len(name) < 60 else brief(name)
        raise SettingError(name, f"{shown} is no field of a request here{hint}")
    if type(value) not in known[name]:
        wanted = " or ".join(JSON_TYPES[kind] for kind in known[name] if kind is not int)
        wanted = wanted or JSON_TYPES[int]
        raise SettingError(
            name, f"{name}={brief(value)} must be {wanted}, not {JSON_TYPES[type(value)]}"
        )
    if isinstance(value, str):
        check_surrogates(name, value)
