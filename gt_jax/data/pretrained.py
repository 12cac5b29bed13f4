"""Tokenizers that come with published models, in the form of `gt_jax.data.tokenizers`."""

import ast
import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gt_jax.data.base import SpecialIds, Tokenizer, check_text, special_names
from gt_jax.data.files import small
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.tokenizer_folders import (
    file_for_class,
    model_ids,
    named_tokens,
    tokenizer_settings,
)
from gt_jax.errors import InputError, one_line

# The World vocabulary has 65,536 tokens of up to 128 bytes, in 1 MB of text.
LARGEST_VOCABULARY = 1 << 24  # ids
LARGEST_TEXT = 1 << 25  # bytes
LONGEST_LINE = 1 << 14  # characters


class WorldTokenizer(Tokenizer):
    """RWKV's World vocabulary: byte strings, of which the longest that fits is taken."""

    kind = "rwkv-world"
    byte_errors = "replace"

    def __init__(self, vocabulary: str, special: SpecialIds | Sequence | None = None):
        """Args:
            vocabulary: `pack` of the file's text, whose lines are id, Python literal, length.
            special: SpecialIds; 0 is always one that ends a text.

        Raises:
            InputError: a line is not of this form, or the packed text is damaged or too large.
        """
        self._packed = vocabulary
        stop = tuple(i for i in SpecialIds.of(special).stop if i != 0)
        self.special = SpecialIds(bos=0, eos=0, pad=0, stop=stop)
        self._bytes = {0: b""}
        for line in self.text.rstrip("\n").split("\n"):
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError("too long")
                number, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
                if not isinstance(token, bytes) or not 0 <= int(number) < LARGEST_VOCABULARY:
                    raise ValueError("neither text nor bytes, or an id out of range")
                self._bytes[int(number)] = token
                length = int(length)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise InputError(f"{line[:80]!r} is no line of an RWKV vocabulary") from error
            if len(token) != length:
                raise InputError(f"{line[:80]!r} has {len(token)} bytes, not {length}")
        self.vocab_size = max(self._bytes) + 1
        self._ids = {token: number for number, token in self._bytes.items() if token}
        # First two bytes -> lengths of the tokens that begin so, longest first.
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    @staticmethod
    def pack(text: str) -> str:
        """The text of a vocabulary file as JSON holds it in half the room."""
        return base64.b64encode(zlib.compress(text.encode())).decode()

    @property
    def text(self) -> str:
        """The vocabulary file."""
        unpack = zlib.decompressobj()
        try:
            text = unpack.decompress(base64.b64decode(self._packed), LARGEST_TEXT)
            if not unpack.eof:
                raise ValueError(f"it ends early or has more than {LARGEST_TEXT:,} bytes")
            return text.decode()
        except (zlib.error, ValueError, TypeError) as error:
            raise InputError(f"the packed vocabulary is damaged ({one_line(error)})") from error

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids. Raises InputError for half a surrogate pair."""
        check_text(text)
        data, known = text.encode(), self._ids
        ids, start = [], 0
        while start < len(data):
            for length in self._lengths.get(data[start : start + 2], ()):
                number = known.get(data[start : start + length])
                if number is not None:
                    break
            else:
                length, number = 1, known.get(data[start : start + 1])
                if number is None:
                    raise InputError(f"the vocabulary has no token for byte {data[start]}")
            ids.append(number)
            start += length
        return np.array(ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Text of integer ids; U+FFFD for an unknown id and for bytes that are no UTF-8."""
        ids = np.asarray(ids).ravel().tolist()
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        return self._bytes.get(i, _UNKNOWN)

    def to_dict(self) -> dict[str, Any]:
        special = self.special.stored() if self.special.stop else {}  # The rest is always so.
        return {"kind": self.kind, "vocabulary": self._packed} | special


class IdTokenizer(Tokenizer):
    """For a model without its tokenizer: text is ids in decimal, such as "17 4 2"."""

    kind = "ids"

    def __init__(self, vocab_size: int, special: SpecialIds | Sequence | None = None):
        self.vocab_size = vocab_size
        self.special = SpecialIds.of(special)

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids. Raises InputError if the text is no list of ids below vocab_size."""
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.vocab_size for word in words):
            raise InputError(
                f"this model has no tokenizer: write ids from 0 to {self.vocab_size - 1}, "
                'such as "17 4 2", or convert it again with --tokenizer=FILE'
            )
        return np.array(list(map(int, words)), np.int32)

    def decode(self, ids: ArrayLike) -> str:
        return " ".join(map(str, np.asarray(ids).ravel().tolist()))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size} | self.special.stored()


def read_tokenizer(path: str | Path | None, folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a file, with the special ids that its folder and the model's tell.

    Args:
        path: a tokenizer.json or an RWKV vocabulary file; None for a model without.
        folder: the model's, see `model_ids`.
        vocab_size: ids of the model.

    Raises:
        InputError: a file cannot be read, or tells what cannot be.
    """
    of_model = model_ids(folder, vocab_size)
    if path is None:
        return IdTokenizer(vocab_size, of_model)
    try:
        return _read_file(Path(path), of_model, vocab_size)
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(
            f"{path} is no tokenizer ({error}); --tokenizer=ids does without"
        ) from error


def read_tokenizer_file(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json or an RWKV vocabulary file, of no model in particular.

    The end of a text is what tokenizer_config.json or config.json beside the file say, else a token
    of the vocabulary that is known to mean it.

    Raises:
        InputError: the file cannot be read, or tells what cannot be.
        OSError: it is not there, or cannot be read.
    """
    of_model = model_ids(Path(path).parent, LARGEST_VOCABULARY)
    tokenizer = _read_file(Path(path), of_model, LARGEST_VOCABULARY)
    if tokenizer.eos_id is None and isinstance(tokenizer, HuggingFaceTokenizer):
        ends = (tokenizer.token_id(token) for token in _ENDS)
        eos = next((i for i in ends if i is not None), None)
        return tokenizer.with_special(tokenizer.special._replace(eos=eos))
    return tokenizer


def _read_file(path: Path, of_model: SpecialIds, vocab_size: int) -> Tokenizer:
    text = small(path).read_text(encoding="utf-8")
    if path.suffix != ".json":
        return WorldTokenizer(WorldTokenizer.pack(_numbered(text)), of_model)
    return _read_hugging_face(text, tokenizer_settings(path.parent), of_model, vocab_size)


def _numbered(text: str) -> str:
    """An RWKV vocabulary with its ids, which older folders on Hugging Face leave out.

    There each line is a token as a literal of bytes, and its place is its id; the first, <s>, is
    the end of a text, which no text holds.
    """
    first, *lines = text.rstrip("\n").split("\n")
    if not first.startswith(("b'", 'b"')):
        return text
    sizes = (_literal_size(line) for line in lines)
    return "\n".join(f"{i} {line} {size}" for i, (line, size) in enumerate(zip(lines, sizes), 1))


def _literal_size(line):
    try:
        token = ast.literal_eval(line) if len(line) <= LONGEST_LINE else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        token = None
    if not isinstance(token, bytes):
        raise InputError(f"{line[:80]!r} is no line of an RWKV vocabulary")
    return len(token)


def _read_hugging_face(text, settings, of_model, vocab_size):
    plain = HuggingFaceTokenizer(text)
    if (for_class := file_for_class(text, settings)) != text:
        plain = HuggingFaceTokenizer(for_class)
    settings = {"pad_token": plain.pads_with} | settings
    tokens = named_tokens(settings, plain.added_tokens, byte_level=plain.byte_errors == "replace")
    tokenizer = HuggingFaceTokenizer(
        plain.with_tokens(tokens.added, vocab_size),
        cleans_up=_cleans_up(settings, plain.is_bpe),
        chat_template=settings["chat_template"],
        splits_special=settings.get("split_special_tokens", False),
    )
    own = [tokenizer.token_id(tokens.names.get(f"{name}_token")) for name in _NAMED]
    either = [theirs if mine is None else mine for mine, theirs in zip(own, of_model)]
    tokenizer = tokenizer.with_special(SpecialIds(*either, stop=of_model.stop))
    if tokenizer.chat_template is not None and tokens.names != special_names(tokenizer):
        tokenizer.names = tokens.names
    return tokenizer


def _cleans_up(settings, is_bpe):
    # As in transformers, which found that it spoils the text of BPE.
    return bool(settings.get("clean_up_tokenization_spaces")) and (
        not is_bpe or bool(settings.get(_CLEANS_BPE))
    )


def export_ids(tokenizer: Tokenizer) -> dict:
    """The fields of config.json and generation_config.json for a tokenizer's special ids.

    Written even where there are none: transformers' configurations have numbers for defaults, which
    would be ordinary characters here.
    """
    ends = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.special.bos,
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": tokenizer.special.pad,
    }


def export_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> content of the files that tell other libraries of a tokenizer."""
    files = {"generation_config.json": json.dumps(export_ids(tokenizer), indent=2) + "\n"}
    if isinstance(tokenizer, WorldTokenizer):
        files[WORLD_FILE] = tokenizer.text
    if isinstance(tokenizer, HuggingFaceTokenizer):
        # Without a class, transformers takes that of the model's type.
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= special_names(tokenizer) if tokenizer.names is None else tokenizer.names
        settings["clean_up_tokenization_spaces"] = tokenizer.cleans_up
        if tokenizer.cleans_up and tokenizer.is_bpe:
            settings[_CLEANS_BPE] = True
        if tokenizer.splits_special:
            settings["split_special_tokens"] = True
        if tokenizer.adds_space:  # which transformers 4 would take out of tokenizer.json
            settings["add_prefix_space"] = True
        if tokenizer.chat_template:
            settings["chat_template"] = tokenizer.chat_template
        files["tokenizer.json"] = tokenizer.text
        files["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    return files


_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
WORLD_FILE = "rwkv_vocab_v20230424.txt"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_NAMED = ("bos", "eos", "pad")  # in the order of SpecialIds
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


PRETRAINED = {t.kind: t for t in (WorldTokenizer, HuggingFaceTokenizer, IdTokenizer)}
