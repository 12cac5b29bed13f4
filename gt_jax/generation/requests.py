"""Requests to a model, and the only checks of their fields.

The server, the generate program and the Python API all make Requests, so a number of a wrong type
or size raises the same named error in each of them.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.generation.checks import (
    INT32,
    SettingError,
    brief,
    check_ids,
    check_real,
    check_surrogates,
    check_whole,
    token_ids,
)
from gt_jax.generation.contexts import Context
from gt_jax.models import LanguageModel

STOP_CHARACTERS = 1024  # of one stop string, at most
MOST_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue and how.

    Attributes:
        prompt: [T] ids, or a Context of `prefill` or `load_context`, which several requests may
            share.
        max_tokens: how many to draw at most, 1 to 2^31 - 1.
        temperature: 0 to 100; top_k: 0 to 2^31 - 1; top_p: above 0, at most 1; min_p: 0 to 1;
            repetition_penalty: 0.01 to 100: see `sampling.Settings`. The penalty applies to tokens
            of the prompt and to drawn ones.
        seed: the same seed gives the same tokens whatever other requests run; 32 bits with sign.
        stop: strings that end the text, each of 1 to 1024 characters; they need a tokenizer and are
            left out of the text, while the tokens end with the one that completes the string.
        stop_ids: token ids that end the text and are left out.
        top_logprobs: how many of the likeliest tokens to name beside each drawn one, 0 to 20.
        prompt_logprobs: whether to score the tokens of the prompt too, all but the first; the
            prompt must be ids.

    Raises:
        InputError: a setting has a wrong type or is out of its range.
    """

    prompt: Any
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self):
        prompt = self.prompt
        if not isinstance(prompt, Context):
            prompt = token_ids("prompt", prompt)
        checked = {
            "prompt": prompt,
            "max_tokens": check_whole("max_tokens", self.max_tokens, 1, INT32),
            "temperature": check_real("temperature", self.temperature, 0, 100),
            "top_k": check_whole("top_k", self.top_k, 0, INT32),
            "top_p": check_real("top_p", self.top_p, 0, 1, above=True),
            "min_p": check_real("min_p", self.min_p, 0, 1),
            "repetition_penalty": check_real(
                "repetition_penalty", self.repetition_penalty, 0.01, 100
            ),
            "seed": check_whole("seed", self.seed, -INT32 - 1, INT32),
            "stop": _checked_stop(self.stop),
            "stop_ids": _checked_stop_ids(self.stop_ids),
            "top_logprobs": check_whole("top_logprobs", self.top_logprobs, 0, MOST_TOP_LOGPROBS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def narrows(self) -> bool:
        """Whether top_k, top_p or min_p leaves tokens out, for which logits are sorted."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _checked_stop(stop):
    if isinstance(stop, str) or not _iterable(stop) or not all(isinstance(s, str) for s in stop):
        raise SettingError("stop", f"stop={brief(stop)} must be strings in a list or tuple")
    if not all(stop):
        raise SettingError("stop", f"stop={brief(stop)} must be strings, none empty")
    for text in stop:
        if len(text) > STOP_CHARACTERS:
            raise SettingError(
                "stop", f"stop of {len(text)} characters must have at most {STOP_CHARACTERS}"
            )
        check_surrogates("stop", text)
    return tuple(stop)


def _checked_stop_ids(stop_ids):
    if isinstance(stop_ids, str) or not _iterable(stop_ids):
        raise SettingError("stop_ids", f"stop_ids={brief(stop_ids)} must be a list of token ids")
    return tuple(check_whole("stop_ids", i, 0, INT32) for i in stop_ids)


def _iterable(value):
    return isinstance(value, list | tuple | set | frozenset | np.ndarray)


class Scores(NamedTuple):
    """Of the tokens of a prompt but the first, [T - 1] each; fields as in Delta."""

    log_probabilities: list[float]
    top: list[dict[int, float]]


class Delta(NamedTuple):
    """The tokens and the text that one burst added to one request.

    index: of the request. tokens: ids. log_probabilities: of each under the model, before any
    setting. text: "" without a tokenizer. reason: None while more will come, else "stop" or
    "length". top: for each token, the request's `top_logprobs` likeliest ids with their
    log-probabilities, likeliest first; empty where it asks for none. prompt: Scores in the first
    Delta of a request with `prompt_logprobs`, else None.
    """

    index: int
    tokens: list[int]
    log_probabilities: list[float]
    text: str
    reason: str | None
    top: list[dict[int, float]] = []  # noqa: RUF012 - a NamedTuple's default, never changed
    prompt: Scores | None = None


class Failure(NamedTuple):
    """A request that ended in an error, and the error."""

    index: int
    error: Exception


class Completion(NamedTuple):
    """The deltas of one request joined; fields as in Delta."""

    tokens: list[int]
    log_probabilities: list[float]
    text: str
    reason: str
    top: list[dict[int, float]]
    prompt: Scores | None


def check_request(model: LanguageModel, request: Request, tokenizer: Tokenizer | None) -> None:
    """Raise InputError for a request that is impossible for this model."""
    config = model.config
    if request.stop and tokenizer is None:
        raise SettingError("stop", f"stop={brief(request.stop)} needs a tokenizer")
    prompt, length = request.prompt, 0
    if isinstance(prompt, Context):
        length = prompt.length
        if request.prompt_logprobs:
            raise SettingError(
                "prompt_logprobs", "prompt_logprobs=True needs a prompt of ids, not a context"
            )
        if prompt.seen.shape != (config.vocab_size,):
            raise SettingError(
                "prompt",
                f"prompt is a context of a vocabulary of {prompt.seen.size} ids, and this model "
                f"has {config.vocab_size}; read the text with this model",
            )
        check_ids("prompt", prompt.waiting, config.vocab_size)
    else:
        length = len(prompt)
        check_ids("prompt", prompt, config.vocab_size)
    if length == 0:
        raise SettingError("prompt", "prompt is empty; give it at least one token")
    limit = config.position_limit
    if limit is not None and length > limit:
        raise SettingError(
            "prompt",
            f"prompt of {length} tokens exceeds the {limit} positions of this model; shorten it",
        )
    # The model never reads the last token drawn.
    if limit is not None and length + request.max_tokens - 1 > limit:
        raise SettingError(
            "max_tokens",
            f"max_tokens={request.max_tokens} after a prompt of {length} tokens exceeds the "
            f"{limit} positions of this model; ask for fewer",
        )
