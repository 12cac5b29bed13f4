"""What all tokenizers have in common."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gt_jax.errors import InputError


class SpecialIds(NamedTuple):
    """Ids that stand for no text; None where a tokenizer has no id of that kind.

    bos: begins a text. eos: ends a document. pad: fills. stop: each of them ends generated text.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    stop: tuple[int, ...] = ()

    @classmethod
    def of(cls, stored: Sequence | None) -> "SpecialIds":
        """From what `stored` gave, through JSON; none from None."""
        special = cls(*(stored or ()))
        return special._replace(stop=tuple(special.stop))

    def stored(self) -> dict[str, list]:
        """As `to_dict` of a tokenizer holds it; empty if there are none."""
        return {"special": [*self[:3], list(self.stop)]} if self != SpecialIds() else {}


class Tokenizer:
    """What every tokenizer has, whether it is of a corpus or of a published model.

    Attributes:
        kind: its name, as stored models have it.
        vocab_size: ids are in [0, vocab_size).
        special: its SpecialIds.
        start_ids: the ids at the beginning of every text that continues no other: of a document,
            of a first prompt.
        byte_errors: how `token_bytes` join, see `gt_jax.generation.text`; None where every token
            is text of its own.
        joins: whether the text of a token depends on the tokens before it; without, the text of ids
            is the text of each, one after another.
    """

    kind: str
    vocab_size: int
    special = SpecialIds()
    start_ids: tuple[int, ...] = ()
    byte_errors: str | None = None
    joins = True

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids of a text."""
        raise NotImplementedError

    def decode(self, ids: ArrayLike) -> str:
        """The text of integer ids."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` takes; JSON can hold it."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int | None:
        """Ends a document; None where there is none."""
        return self.special.eos

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what is generated."""
        return tuple(dict.fromkeys(i for i in (self.eos_id, *self.special.stop) if i is not None))

    def encode_after(self, text: str, before: str) -> np.ndarray:
        """[n] int32 ids of a text that follows another; `before` is the end of that."""
        return self.encode(text)

    def token_text(self, i: int | None) -> str | None:
        """Token i as people read it; None for None."""
        return None if i is None else self.decode([i])

    def token_bytes(self, i: int) -> bytes | None:
        """The bytes of token i, or None if it is text of its own."""
        return None


def check_text(text: str) -> None:
    """Raise InputError for text that has no UTF-8: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 12, 0) : error.start + 12]
        raise InputError(
            f"text holds half a surrogate pair, {text[error.start]!r} in {around!r}, which is no "
            "character; remove it"
        ) from error


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens of a tokenizer by name, such as {"eos_token": "</s>"}."""
    ids = {name: getattr(tokenizer.special, name) for name in ("bos", "eos", "pad")}
    texts = {f"{n}_token": None if i is None else tokenizer.token_text(i) for n, i in ids.items()}
    return {name: text for name, text in texts.items() if text is not None}
