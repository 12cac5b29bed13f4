"""Text to ids and back: characters, characters behind tags, SentencePiece BPE.

Every tokenizer has

    kind        its name in `data.tokenizer`
    vocab_size  ids are in [0, vocab_size)
    eos_id      ends a document in a corpus of many; None where there is none
    stop_ids    ids that end what is generated; special: these and others, a SpecialIds
    encode(text) -> [n] int32 array        decode(ids) -> str
    to_dict() -> what `tokenizer_from_dict` takes; JSON can hold it
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gt_jax.data.base import SpecialIds, Tokenizer
from gt_jax.data.corpora import Corpus, replace_file
from gt_jax.data.files import PREPARED_TOKENIZER, small
from gt_jax.data.pretrained import PRETRAINED, read_tokenizer_file
from gt_jax.data.sentence_piece import SentencePieceTokenizer, train_sentencepiece
from gt_jax.errors import InputError, did_you_mean, one_line


class CorpusTokens(NamedTuple):
    """The token ids of a corpus: one [n] int32 array a document, MappedTokens if on disk."""

    train: Sequence[np.ndarray]
    validation: Sequence[np.ndarray]


def make_tokenizer(
    kind: str, corpus: Corpus, *, vocab_size: int | None = None, cache_dir: str | Path | None = None
) -> Tokenizer:
    """Builds the tokenizer of a corpus.

    Args:
        kind: "char" (ids 0, 1, ... in order of code point), "char97" (the same after 32 reserved
            ids, of which the first eight are tags; 97 ids for Shakespeare), "sentencepiece", or a
            file, see `read_tokenizer`.
        corpus: a Corpus. Characters come from both splits, SentencePiece trains on the first.
        vocab_size: of SentencePiece; the others find their own.
        cache_dir: folder that keeps a trained SentencePiece model for the next call, or None.

    Returns:
        A tokenizer.

    Raises:
        InputError: the kind is unknown, or the text cannot support vocab_size.
    """
    if kind == "sentencepiece":
        return _cached_sentencepiece(corpus.train, vocab_size, cache_dir)
    if kind in ("char", "char97"):
        alphabet = set().union(*corpus.train, *corpus.validation)
        return CharTokenizer(alphabet) if kind == "char" else TaggedCharTokenizer(alphabet)
    return read_tokenizer(kind, "data.tokenizer")


def read_tokenizer(path: str, named: str) -> Tokenizer:
    """The tokenizer in a file: a tokenizer.json, a SentencePiece .model, an RWKV vocabulary.

    Args:
        path: the file; or a folder that holds a tokenizer.json or was prepared, for its tokenizer.
        named: what named the file, to begin a message with.

    Raises:
        InputError: it is no tokenizer.
    """
    file = Path(path).expanduser()
    where = f"{named}={path!r}"
    try:
        inside = [file / PREPARED_TOKENIZER, file / "tokenizer.json", file / "tokenizer.model"]
        file = next((p for p in inside if p.is_file()), file)
        if not file.exists():
            hint = did_you_mean(path, KINDS)
            raise InputError(f"{where} must be one of {', '.join(KINDS)}, or a file{hint}")
        if file.suffix == ".model":
            return SentencePieceTokenizer(small(file).read_bytes())
        if file.name == PREPARED_TOKENIZER:
            return tokenizer_from_dict(json.loads(small(file).read_bytes()))
        return read_tokenizer_file(file)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError) and str(error).startswith(where):
            raise
        raise InputError(
            f"{where} is no tokenizer.json, SentencePiece .model or RWKV vocabulary "
            f"({one_line(error)}); name one"
        ) from error


def tokenizer_from_dict(d: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_dict()` gave d."""
    kind, arguments = d["kind"], {k: v for k, v in d.items() if k != "kind"}
    if kind == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(arguments["model"]))
    return (KINDS | PRETRAINED)[kind](**arguments)


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> CorpusTokens:
    """The ids of every document, as CorpusTokens.

    Each begins with the tokenizer's start_ids, and in a corpus of many documents each ends with its
    eos id, if it has one.
    """
    many = len(corpus.train) > 1 or len(corpus.validation) > 1
    end = [tokenizer.eos_id] if many and tokenizer.eos_id is not None else []

    def encode(document):
        parts = (tokenizer.start_ids, tokenizer.encode(document), end)
        return np.concatenate([np.array(part, np.int32) for part in parts])

    return CorpusTokens(tuple(map(encode, corpus.train)), tuple(map(encode, corpus.validation)))


class CharTokenizer(Tokenizer):
    """One id a character, in order of code point, from `first_id` up."""

    kind = "char"
    joins = False
    first_id = 0

    def __init__(self, alphabet: Iterable[str]):
        """Args: alphabet: the characters, in any order; repetitions are allowed."""
        self.alphabet = "".join(sorted(set(alphabet)))
        self.vocab_size = self.first_id + len(self.alphabet)
        points = _code_points(self.alphabet)
        # Code point -> id; the last entry stands for everything past the alphabet.
        self._ids = np.full(points.max(initial=0) + 2, -1, np.int32)
        self._ids[points] = self.first_id + np.arange(len(points), dtype=np.int32)
        # Id -> code point; the last entry stands for every unknown id.
        self._points = np.full(self.vocab_size + 1, ord("?"), np.uint32)
        self._points[self.first_id : -1] = points

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids. Raises InputError where a character has none."""
        ids = self._look_up(text)
        if (ids < 0).any():
            unknown = sorted(set(text) - set(self.alphabet))
            shown = ", ".join(map(repr, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            raise InputError(
                f"text holds {shown}, not among the {len(self.alphabet)} characters of the char"
                " tokenizer; leave them out, or train with data.tokenizer=sentencepiece"
            )
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """Text of integer ids; "?" for an id without a character."""
        ids = np.asarray(ids, np.int64).ravel()
        known = (ids >= 0) & (ids < self.vocab_size)
        points = self._points[np.where(known, ids, self.vocab_size)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}

    def _look_up(self, text):
        """[n] int32 ids, -1 for an unknown character."""
        return self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]


class TaggedCharTokenizer(CharTokenizer):
    """Characters from id 32 up; ids 0 to 10 are tags, each one token; 11 to 31 are reserved.

    Tags 8 to 10 begin the segments of model.segment_token=8.
    """

    kind = "char97"
    tags = tuple(
        f"<|{name}|>"
        for name in (
            *("pad", "unk", "bos", "eos", "system", "user", "assistant", "end_of_turn"),
            *("input", "thinking", "output"),
        )
    )
    special = SpecialIds(bos=2, eos=3, pad=0)
    first_id = 32

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids; 1 for an unknown character."""
        if "<|" not in text:
            return self._encode_plain(text)
        runs = re.split(f"({'|'.join(map(re.escape, self.tags))})", text)  # tags and text between
        tag_ids = {tag: np.array([i], np.int32) for i, tag in enumerate(self.tags)}
        return np.concatenate(
            [tag_ids[run] if run in tag_ids else self._encode_plain(run) for run in runs]
        )

    def decode(self, ids: ArrayLike) -> str:
        """Text of integer ids: tags as written, "?" for a reserved or unknown id."""
        ids = np.asarray(ids, np.int64).ravel()
        is_tag = (ids >= 0) & (ids < len(self.tags))
        if not is_tag.any():
            return super().decode(ids)
        cuts = np.flatnonzero(is_tag)
        runs = np.split(ids, np.stack([cuts, cuts + 1], axis=1).ravel())
        decode_run = super().decode
        return "".join(
            self.tags[run[0]] if i % 2 else decode_run(run) for i, run in enumerate(runs)
        )

    def _encode_plain(self, text):
        ids = self._look_up(text)
        return np.where(ids < 0, np.int32(1), ids)


def _cached_sentencepiece(documents, vocab_size, cache_dir):
    """The tokenizer of these documents from cache_dir, else trained and left there."""
    if cache_dir is None:
        return train_sentencepiece(documents, vocab_size)
    digest = hashlib.sha256(str(vocab_size).encode())
    for text in documents:
        digest.update(b"\xff" + text.encode("utf-8", "surrogatepass"))  # 0xff parts documents
    trained_on = digest.hexdigest()
    path = Path(cache_dir) / "sentencepiece.json"
    try:
        cached = json.loads(path.read_bytes())
        if cached["trained_on"] == trained_on:
            return tokenizer_from_dict(cached["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none yet, or it is not one of ours: train below
    tokenizer = train_sentencepiece(documents, vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    cached = {"trained_on": trained_on, "tokenizer": tokenizer.to_dict()}
    replace_file(path, json.dumps(cached).encode())
    return tokenizer


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


KINDS = {t.kind: t for t in (CharTokenizer, TaggedCharTokenizer, SentencePieceTokenizer)}
