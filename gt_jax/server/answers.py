"""What the answers of every endpoint share: choices, usage, and the objects of a stream."""

import math
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.generation.requests import Delta
from gt_jax.generation.text import TextOut
from gt_jax.server.bodies import Ask


class Answer:
    """The objects of one answer: `whole` of all its Deltas, `chunks` of each in a stream.

    A subclass has `choice` and `chunk_choice` (the choice object of a Delta at a place in the
    answer, of the whole and of a stream), `prefix` of the id, and the names of its objects.
    """

    prefix = whole_object = chunk_object = ""

    def __init__(
        self,
        ask: Ask,
        tokenizer: Tokenizer,
        name: str,
        token_text: Callable[[int], tuple[str, bytes]],
    ):
        """Args: name: of the model. token_text: text and bytes of one token id."""
        self.ask, self.tokenizer, self.token_text = ask, tokenizer, token_text
        self._drawn, self._begun, self._ended = 0, set(), 0
        self._readers: dict[int, Any] = {}  # index of a request -> what reads its tokens
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._head["model"] = name

    def choice(self, delta: Delta, place: int, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choice(self, delta: Delta, place: int, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def usage(self) -> dict[str, int]:
        """What was read, each prompt once, and drawn so far."""
        read = sum(len(request.prompt) for request in self.ask.requests[:: self.ask.best_of])
        drawn = self._drawn if self.ask.draws else 0
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
        }

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The object of a whole answer: of each prompt's choices the n with the best mean."""
        ask, choices = self.ask, []
        joined = [join([d for d in deltas if d.index == i]) for i in range(len(ask.requests))]
        self._drawn = sum(len(delta.tokens) for delta in joined)
        for start in range(0, len(joined), ask.best_of):
            of_prompt = joined[start : start + ask.best_of]
            if ask.best_of > ask.n:
                of_prompt = sorted(of_prompt, key=_mean, reverse=True)[: ask.n]
            for delta in of_prompt:
                choices.append(self.choice(delta, len(choices), first=True))
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage}

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The objects of a stream for one Delta; the usage, where it is wanted, after the last."""
        head = self._head | {"object": self.chunk_object}
        absent = {"usage": None} if self.ask.include_usage else {}
        self._drawn += len(delta.tokens)
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = self.chunk_choice(delta, delta.index, first=first)
        yield head | {"choices": [choice]} | absent
        self._ended += delta.reason is not None
        if self._ended == len(self.ask.requests) and self.ask.include_usage:
            yield head | {"choices": [], "usage": self.usage}


def join(deltas: list[Delta]) -> Delta:
    """One Delta of all those of a request."""
    return deltas[-1]._replace(
        tokens=[token for delta in deltas for token in delta.tokens],
        log_probabilities=[value for delta in deltas for value in delta.log_probabilities],
        text="".join(delta.text for delta in deltas),
        top=[top for delta in deltas for top in delta.top],
        prompt=deltas[0].prompt,
    )


def _mean(delta):
    """Log-probability per token, as OpenAI's best_of ranks choices."""
    return sum(delta.log_probabilities) / max(len(delta.tokens), 1)


def finite(value: float | None) -> float | None:
    """A log-probability as JSON has it: null for none, and for that of an impossible token."""
    return value if value is not None and math.isfinite(value) else None


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    r"""Text and bytes of one token between others; bytes that are no text as `bytes:\xe2`."""
    if data := tokenizer.token_bytes(token):
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
    before = tokenizer.encode("a") if tokenizer.kind == "huggingface" else []
    reader = TextOut(tokenizer, before)  # some tokenizers drop a space at the beginning
    text = reader.add([token])[0] + reader.end()
    return text, text.encode()
