"""tokenizer.json of the tokenizers package, read as transformers reads it."""

import contextlib
import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gt_jax.data.base import SpecialIds, Tokenizer, check_text
from gt_jax.errors import InputError, one_line

if TYPE_CHECKING:
    from tokenizers import AddedToken


@contextlib.contextmanager
def _one_line(fault: str):
    """InputError for what the tokenizers package raises: bare Exceptions, and panics beside them.

    A panic is no Exception but a BaseException of a class that cannot be imported.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"tokenizer.json {fault} ({one_line(error)})") from error


class HuggingFaceTokenizer(Tokenizer):
    """What a tokenizer.json of the tokenizers package says, as transformers reads it.

    Truncation and padding that the file holds do not act, as in transformers.
    """

    kind = "huggingface"

    def __init__(
        self,
        json: str,
        special: SpecialIds | Sequence | None = None,
        cleans_up: bool = False,
        chat_template: str | None = None,
        splits_special: bool = False,
        names: Mapping[str, str] | None = None,
    ):
        """Args:
            json: the text of tokenizer.json.
            special: SpecialIds.
            cleans_up: whether decoding removes spaces before punctuation, see `clean_up`.
            chat_template: of a dialogue, in Jinja; None for none.
            splits_special: whether special tokens in a text are encoded as any other text.
            names: of special tokens in the chat template, such as {"eos_token": "</s>"}; None for
                those of `special`.

        Raises:
            InputError: the package is missing, or cannot read the text.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError("tokenizer.json needs a package: pip install tokenizers") from error
        with _one_line("cannot be read"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        self.pads_with = (self._tokenizer.padding or {}).get("pad_token")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = splits_special
        self.text, self.cleans_up, self.splits_special = json, cleans_up, splits_special
        self.chat_template, self.names = chat_template, names
        self.special = SpecialIds.of(special)
        # An embedding needs a row for the largest id, however many ids below it are unused.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.byte_errors = _byte_errors(self._tokenizer.decoder)
        self._cached_bytes = functools.cache(self._find_bytes)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """[n] int32 ids; with those that the file puts around a text if `special`.

        Raises:
            InputError: half a surrogate pair.
        """
        check_text(text)
        with _one_line("cannot encode this text"):
            # Without offsets, twice as fast; the ids are the same.
            [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
            return np.array(found.ids, np.int32)

    def encode_after(self, text: str, before: str) -> np.ndarray:
        """[n] int32 ids of a text that follows another; `before` is the end of that.

        Many tokenizers put a space before every text, which must not come between the two.
        """
        for first in (before[-1:], "a", "\n"):
            first_ids, both = self.encode(first), self.encode(first + text)
            if len(first_ids) and np.array_equal(both[: len(first_ids)], first_ids):
                return both[len(first_ids) :]
        return self.encode(text)

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        found = self._tokenizer.encode("a", add_special_tokens=True)
        own = [n for n, is_special in enumerate(found.special_tokens_mask) if not is_special]
        return tuple(found.ids[: own[0]]) if own else ()

    def decode(self, ids: ArrayLike, *, special: bool = True) -> str:
        """Text of integer ids; ids that the vocabulary lacks are left out.

        Special tokens are left out too unless `special`.
        """
        text = self.decode_as_is(ids, special=special)
        return clean_up(text) if self.cleans_up else text

    def decode_as_is(self, ids: ArrayLike, *, special: bool = True) -> str:
        """Text before it is cleaned up."""
        ids = [i for i in np.asarray(ids).ravel().tolist() if i >= 0]
        with _one_line("cannot decode these ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=not special)

    @property
    def added_tokens(self) -> "dict[int, AddedToken]":
        """The tokens that stand beside the vocabulary, by id."""
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def adds_space(self) -> bool:
        """Whether the pre-tokenizer has a setting add_prefix_space, and it is true."""
        before = self._tokenizer.pre_tokenizer
        return before is not None and bool(getattr(before, "add_prefix_space", False))

    @property
    def is_bpe(self) -> bool:
        return type(self._tokenizer.model).__name__ == "BPE"

    def token_id(self, token: str | None) -> int | None:
        """The id of a token of the vocabulary; None for None or an unknown one."""
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def with_tokens(self, added: Sequence["AddedToken"], vocab_size: int) -> str:
        """tokenizer.json with more tokens, but for those that get ids from vocab_size on.

        The file's own tokens stay, whatever their ids.
        """
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(self.text)
        before = made.to_str()
        with _one_line("cannot take the tokens of its folder"):
            made.add_tokens(list(added))
        after = made.to_str()
        if after == before:
            return self.text
        content, most = json.loads(after), max(vocab_size, self.vocab_size)
        fits = [token for token in content["added_tokens"] if token["id"] < most]
        if len(fits) == len(content["added_tokens"]):
            return after
        return json.dumps(content | {"added_tokens": fits}, ensure_ascii=False)

    def with_special(self, special: SpecialIds) -> "HuggingFaceTokenizer":
        """This tokenizer with other special ids."""
        other = copy.copy(self)  # reading the file again takes seconds for large vocabularies
        other.special = special
        return other

    def token_text(self, i: int | None) -> str | None:
        """A token as the vocabulary spells it; None for None or an unknown id."""
        return None if i is None else self._tokenizer.id_to_token(i)

    def token_bytes(self, i: int) -> bytes | None:
        """The bytes of token i, empty for an unknown id; None if the token is text of its own."""
        return self._cached_bytes(i)

    def _find_bytes(self, i) -> bytes | None:
        token = self._tokenizer.id_to_token(i) if i >= 0 else None
        if token is None:
            return b"" if self.byte_errors else None  # decoding passes over it
        if self.byte_errors == "replace":
            known = all(letter in _BYTE_OF_LETTER for letter in token)
            return bytes(_BYTE_OF_LETTER[c] for c in token) if known else token.encode()
        is_byte = self.byte_errors == "whole" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
        return bytes.fromhex(token[3:5]) if is_byte else None

    def to_dict(self) -> dict[str, Any]:
        names = ("cleans_up", "chat_template", "splits_special", "names")
        more = {name: getattr(self, name) for name in names}
        more = {name: value for name, value in more.items() if value or value == {}}
        return {"kind": self.kind, "json": self.text} | more | self.special.stored()


def clean_up(text: str) -> str:
    """Text without the spaces that WordPiece tokenizers leave, as transformers removes them."""
    for wrong in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(wrong, wrong.strip())
    return text


def _byte_errors(decoder):
    """Tokenizer.byte_errors of a decoder of the tokenizers package."""
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return "replace" if kinds <= {"ByteLevel", "Fuse"} else "unknown"
    return "whole" if "ByteFallback" in kinds else None


def _byte_of_letter():
    """Letter -> byte: byte-level vocabularies write bytes that do not print as U+0100 and up."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(prints))
    letters = {chr(byte): byte for byte in prints}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()
