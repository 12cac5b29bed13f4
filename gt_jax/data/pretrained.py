"""Tokenizers that come with published models, in the form of `gt_jax.data.tokenizers`."""

import ast
import base64
import functools
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gt_jax.errors import InputError


class SpecialIds(NamedTuple):
    """Ids that are no text, None where there is none.

    bos: stands before a text. eos: ends a document. pad: fills. stop: each ends what is generated.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    stop: tuple[int, ...] = ()

    @classmethod
    def of(cls, stored):
        """From what `stored` gave, through JSON; none from None."""
        special = cls(*(stored or ()))
        return special._replace(stop=tuple(special.stop))

    def stored(self):
        """As `to_dict` of a tokenizer holds it; empty if there are none."""
        return {"special": [*self[:3], list(self.stop)]} if self != SpecialIds() else {}


class Tokenizer:
    """What every tokenizer has, whether it is of a corpus or of a published model.

    Attributes:
        special: its SpecialIds.
        start_ids: ids that a text of its own begins with, such as a prompt or a document.
        byte_errors: how `token_bytes` join, see `gt_jax.generation.text`; None where every token
            is text of its own.
    """

    special = SpecialIds()
    start_ids: tuple[int, ...] = ()
    byte_errors: str | None = None

    @property
    def eos_id(self):
        """Ends a document; None where there is none."""
        return self.special.eos

    @property
    def stop_ids(self):
        """Ids that end what is generated."""
        return tuple(dict.fromkeys(i for i in (self.eos_id, *self.special.stop) if i is not None))

    def token_bytes(self, i):
        """The bytes of token i, or None if it is text of its own."""
        return None


def check_text(text):
    """Raise InputError for text that has no UTF-8: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 12, 0) : error.start + 12]
        raise InputError(
            f"text holds half a surrogate pair, {text[error.start]!r} in {around!r}, which is no "
            "character; remove it"
        ) from error


class WorldTokenizer(Tokenizer):
    """RWKV's World vocabulary: byte strings, of which the longest that fits is taken."""

    kind = "rwkv-world"
    byte_errors = "replace"

    def __init__(self, vocabulary, special=None):
        """Args:
            vocabulary: `pack` of the file's text, whose lines are id, Python literal, length.
            special: SpecialIds; 0 is always one that ends a text.

        Raises:
            InputError: a line is not of this form.
        """
        self._packed = vocabulary
        stop = tuple(i for i in SpecialIds.of(special).stop if i != 0)
        self.special = SpecialIds(bos=0, eos=0, pad=0, stop=stop)
        self._bytes = {0: b""}
        for line in self.text.rstrip("\n").split("\n"):
            try:
                number, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else bytes(token)
                self._bytes[int(number)] = token
            except (ValueError, SyntaxError, TypeError) as error:
                raise InputError(f"{line[:80]!r} is no line of an RWKV vocabulary") from error
            if len(token) != int(length):
                raise InputError(f"{line[:80]!r} has {len(token)} bytes, not {length}")
        self.vocab_size = max(self._bytes) + 1
        self._ids = {token: number for number, token in self._bytes.items() if token}
        # First byte -> lengths of its tokens, longest first.
        self._lengths = [set() for _ in range(256)]
        for token in self._ids:
            self._lengths[token[0]].add(len(token))
        self._lengths = [sorted(lengths, reverse=True) for lengths in self._lengths]

    @staticmethod
    def pack(text):
        """The text of a vocabulary file as JSON holds it in half the room."""
        return base64.b64encode(zlib.compress(text.encode())).decode()

    @property
    def text(self):
        """The vocabulary file."""
        return zlib.decompress(base64.b64decode(self._packed)).decode()

    def encode(self, text):
        """[n] int32 ids. Raises InputError for half a surrogate pair."""
        check_text(text)
        data = text.encode()
        ids, start = [], 0
        while start < len(data):
            for length in self._lengths[data[start]]:
                number = self._ids.get(data[start : start + length])
                if number is not None:
                    break
            else:
                raise InputError(f"the vocabulary has no token for byte {data[start]}")
            ids.append(number)
            start += length
        return np.array(ids, np.int32)

    def decode(self, ids):
        """Text of integer ids; U+FFFD for an unknown id and for bytes that are no UTF-8."""
        ids = np.asarray(ids).ravel().tolist()
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i):
        return self._bytes.get(i, _UNKNOWN)

    def to_dict(self):
        special = self.special.stored() if self.special.stop else {}  # The rest is always so.
        return {"kind": self.kind, "vocabulary": self._packed} | special


class HuggingFaceTokenizer(Tokenizer):
    """What a tokenizer.json of the tokenizers package says, as transformers reads it.

    Truncation and padding that the file holds do not act, as in transformers.
    """

    kind = "huggingface"

    def __init__(self, json, special=None, cleans_up=False, chat_template=None):
        """Args:
            json: the text of tokenizer.json.
            special: SpecialIds.
            cleans_up: whether decoding removes spaces before punctuation, see `clean_up`.
            chat_template: of a dialogue, in Jinja; None for none.

        Raises:
            InputError: the package is missing, or cannot read the text.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError("tokenizer.json needs a package: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the package raises bare Exceptions
            raise InputError(f"tokenizer.json cannot be read ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.text, self.cleans_up, self.chat_template = json, cleans_up, chat_template
        self.special = SpecialIds.of(special)
        # An embedding needs a row for the largest id, however many ids below it are unused.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.byte_errors = _byte_errors(self._tokenizer.decoder)
        self.token_bytes = functools.cache(self._token_bytes)

    def encode(self, text, *, special=False):
        """[n] int32 ids; with those that the file puts around a text if `special`.

        Raises:
            InputError: half a surrogate pair.
        """
        check_text(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    @functools.cached_property
    def start_ids(self):
        found = self._tokenizer.encode("a", add_special_tokens=True)
        own = [n for n, is_special in enumerate(found.special_tokens_mask) if not is_special]
        return tuple(found.ids[: own[0]]) if own else ()

    def decode(self, ids):
        """Text of integer ids; ids that the vocabulary lacks are left out."""
        text = self.decode_as_is(ids)
        return clean_up(text) if self.cleans_up else text

    def decode_as_is(self, ids):
        """Text before it is cleaned up."""
        ids = [i for i in np.asarray(ids).ravel().tolist() if i >= 0]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_text(self, i):
        """A token as the vocabulary spells it; None for None or an unknown id."""
        return None if i is None else self._tokenizer.id_to_token(i)

    def _token_bytes(self, i):
        token = self._tokenizer.id_to_token(i) if i >= 0 else None
        if token is None and self.byte_errors:
            return b""  # decoding passes over it
        if self.byte_errors == "replace":
            known = all(letter in _BYTE_OF_LETTER for letter in token)
            return bytes(map(_BYTE_OF_LETTER.get, token)) if known else token.encode()
        is_byte = self.byte_errors == "whole" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
        return bytes.fromhex(token[3:5]) if is_byte else None

    def to_dict(self):
        more = {"cleans_up": self.cleans_up, "chat_template": self.chat_template}
        more = {name: value for name, value in more.items() if value}
        return {"kind": self.kind, "json": self.text} | more | self.special.stored()


def clean_up(text):
    """Text without the spaces that word-piece tokenizers leave, as transformers removes them."""
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
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class IdTokenizer(Tokenizer):
    """For a model without its tokenizer: text is ids in decimal, such as "17 4 2"."""

    kind = "ids"

    def __init__(self, vocab_size, special=None):
        self.vocab_size = vocab_size
        self.special = SpecialIds.of(special)

    def encode(self, text):
        """[n] int32 ids. Raises InputError if the text is no list of ids below vocab_size."""
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.vocab_size for word in words):
            raise InputError(
                f"this model has no tokenizer: write ids from 0 to {self.vocab_size - 1}, "
                'such as "17 4 2", or convert it again with --tokenizer=FILE'
            )
        return np.array(list(map(int, words)), np.int32)

    def decode(self, ids):
        return " ".join(map(str, np.asarray(ids).ravel().tolist()))

    def to_dict(self):
        return {"kind": self.kind, "vocab_size": self.vocab_size} | self.special.stored()


PRETRAINED = {t.kind: t for t in (WorldTokenizer, HuggingFaceTokenizer, IdTokenizer)}
