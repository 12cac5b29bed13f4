"""OpenAI's /v1/completions: the Requests in a body, and the answer's objects."""

import math
from collections.abc import Mapping
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError
from gt_jax.generation.checks import SettingError, brief, check_whole
from gt_jax.generation.prompts import encode_prompt
from gt_jax.generation.requests import MOST_TOP_LOGPROBS, Delta, Request, check_request
from gt_jax.generation.text import TextOut
from gt_jax.models import LanguageModel
from gt_jax.server import answers, bodies

PROMPT_TOKENS, DEFAULT_TOKENS = 2**16, 16  # a prompt has at most; drawn where nothing is said
FIELDS = bodies.COMMON | {"prompt": (str, list), "logprobs": (int,), "echo": (bool,)}
FIELDS |= {"best_of": (int,)}
NEUTRAL = bodies.NEUTRAL | {"suffix": ((str,), ("",))}


def parse(data: bytes, model: LanguageModel, tokenizer: Tokenizer, max_tokens: int) -> bodies.Ask:
    """The Ask in the bytes of a body.

    Args:
        max_tokens: that a request may ask for.

    Raises:
        InputError: the body is invalid; a SettingError if one field is at fault.
    """
    body = bodies.read_body(data, FIELDS, NEUTRAL)
    prompts = prompts_of(body.get("prompt", ""))
    ids = [prompt_ids(prompt, tokenizer, model) for prompt in prompts]
    n, best_of = bodies.choices_asked(body, ids)
    streams, echo = body.get("stream", False), body.get("echo", False)
    if streams and best_of > n:
        raise SettingError("best_of", f"best_of={best_of} needs stream=false, or n={best_of}")
    logprobs = body.get("logprobs")
    if logprobs is not None:
        check_whole("logprobs", logprobs, 0, MOST_TOP_LOGPROBS)
    longest, least = max(map(len, ids)), 0 if echo else 1
    most = tokens_asked(body, model, longest, max_tokens, default=DEFAULT_TOKENS, least=least)
    draws = most > 0  # else the prompt alone: one token is drawn, and left out
    more = {"max_tokens": most if draws else 1, "stop_ids": tokenizer.stop_ids}
    more |= {"top_logprobs": logprobs or 0, "prompt_logprobs": echo and logprobs is not None}
    # Without a seed each prompt has one of its own: equal prompts would get equal answers.
    requests = [
        Request(prompt, **more, **one) for prompt in ids for one in bodies.sampling(body, best_of)
    ]
    for request in requests[::best_of]:
        check_request(model, request, tokenizer)
    echoes = [_echo(*pair, tokenizer) for pair in zip(prompts, ids)] if echo else None
    usage = bodies.include_usage(body)
    return bodies.Ask(requests, n, best_of, streams, logprobs, usage, echoes, draws)


def tokens_asked(
    body: Mapping[str, Any],
    model: LanguageModel,
    longest: int,
    max_tokens: int,
    *,
    default: int,
    least: int = 1,
    name: str = "max_tokens",
) -> int:
    """How many tokens a body asks for in the field `name`.

    Args:
        longest: tokens of its longest prompt.
        max_tokens: that it may ask for.
        default: what a body gets that says nothing, or fewer where there is room for no more.
        least: that it may ask for.
    """
    if name in body:
        return check_whole(name, body[name], least, max_tokens)
    room = (model.config.position_limit or math.inf) - longest + 1
    return int(max(min(default, max_tokens, room), 1))


def prompts_of(prompt: str | list) -> list[str | list]:
    """The prompts in a field: a text, ids, or a list of one of these."""
    many = isinstance(prompt, list) and prompt and all(type(p) in (str, list) for p in prompt)
    prompts = prompt if many and isinstance(prompt, list) else [prompt]
    if len(prompts) > bodies.CHOICES:
        raise SettingError(
            "prompt", f"prompt holds {len(prompts)} prompts; send at most {bodies.CHOICES}"
        )
    return prompts


def prompt_ids(
    prompt: str | list, tokenizer: Tokenizer, model: LanguageModel, name: str = "prompt"
) -> Any:
    """[T] ids of one prompt, a text or ids, as many as `model` takes; `name` is its field."""
    if isinstance(prompt, str):
        try:
            prompt = encode_prompt(tokenizer, prompt, "prompt").tolist()
        except SettingError:
            raise
        except InputError as error:
            raise SettingError("prompt", str(error)) from error
    for odd in (p for p in prompt if type(p) is not int):
        raise SettingError("prompt", f"prompt holds {brief(odd)}, which is no token id")
    most = min(PROMPT_TOKENS, model.config.position_limit or PROMPT_TOKENS)
    if len(prompt) > most:
        raise SettingError(name, f"{name} of {len(prompt)} tokens must have at most {most}")
    return prompt


def _echo(prompt, ids, tokenizer):
    if not isinstance(prompt, str):
        return bodies.Echo(tokenizer.decode(ids), 0)
    return bodies.Echo(prompt, len(ids) - len(tokenizer.encode(prompt)))


class Answer(answers.Answer):
    """The objects of one answer of /v1/completions.

    The log-probability of a token belongs to the text that the token completed; `text_offset` is
    the number of characters of the choice's text before that text.
    """

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl"

    def choice(self, delta: Delta, place: int, *, first: bool) -> dict[str, Any]:
        """The choice object of one Delta, or of several joined."""
        text, reason = delta.text, delta.reason
        if not self.ask.draws:
            text, reason = "", reason and "length"
        if first and self.ask.echo is not None:
            text = self.ask.echo[delta.index // self.ask.best_of].text + text
        logprobs = None if self.ask.logprobs is None else self._logprobs(delta, first)
        choice = {"index": place, "text": text, "logprobs": logprobs}
        return choice | {"finish_reason": reason}

    chunk_choice = choice

    def _logprobs(self, delta, first):
        """tokens, token_logprobs, top_logprobs and text_offset, the prompt's where it is echoed."""
        entries: list[tuple] = self._start(delta) if first else []  # place, value, top, token
        reader = self._readers[delta.index]
        drawn = zip(delta.tokens, delta.log_probabilities, delta.top or [{}] * len(delta.tokens))
        for token, value, top in drawn if self.ask.draws else ():
            entries.append((*reader.place(token), value, top, token))
        return {
            "tokens": [entry[0] for entry in entries],
            "token_logprobs": [answers.finite(entry[2]) for entry in entries],
            "top_logprobs": [self._named(*entry[2:]) for entry in entries]
            if self.ask.logprobs
            else None,
            "text_offset": [entry[1] for entry in entries],
        }

    def _start(self, delta) -> list[tuple]:
        """The entries of an echoed prompt; makes the reader of what follows."""
        prompt = self.ask.requests[delta.index].prompt.tolist()
        if self.ask.echo is None:
            self._readers[delta.index] = _Reader(self.tokenizer, prompt)
            return []
        hidden = self.ask.echo[delta.index // self.ask.best_of].hidden
        reader = self._readers[delta.index] = _Reader(self.tokenizer, prompt[:hidden])
        places = [(self.token_text(token)[0], 0) for token in prompt[:hidden]]
        places += map(reader.place, prompt[hidden:])
        values, tops = [None, *delta.prompt.log_probabilities], [None, *delta.prompt.top]
        return [(*place, *entry) for place, *entry in zip(places, values, tops, prompt)]

    def _named(self, value, top, token):
        """Text -> log-probability of the likeliest tokens and of the token itself."""
        if top is None:
            return None
        named = {}
        for i, other in [*top.items(), (token, value)]:
            if math.isfinite(other):
                named.setdefault(self.token_text(i)[0], other)  # the likelier of equal texts
        return named


class _Reader:
    """The text of tokens one after the other, each with the number of characters before it."""

    def __init__(self, tokenizer, before):
        self._texts, self._offset = TextOut(tokenizer, before), 0

    def place(self, token):
        text, offset = self._texts.add([token])[0], self._offset
        self._offset += len(text)
        return text, offset
