"""SentencePiece models: trained on a corpus, or given."""

import base64
import functools
import io
import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gt_jax.data.base import SpecialIds, Tokenizer, check_text
from gt_jax.errors import InputError, one_line

_BLOCK_LENGTH = 1_000_000  # characters
_SAMPLE = 1 << 24  # characters to train on
THREADS = 16  # for large texts; a constant, because the model's file records it
# What the package raises where it refuses its input; up to 0.2.1 a SyntaxError for an argument.
_REFUSED = (RuntimeError, ValueError, SyntaxError)
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class SentencePieceTokenizer(Tokenizer):
    """Byte-pair encoding that falls back to bytes, so that every text has ids.

    Decoding gives the text back, except that U+2581, SentencePiece's own space, becomes a space.
    """

    kind = "sentencepiece"
    byte_errors = "each"

    def __init__(self, model: bytes):
        """Args: model: the serialised SentencePiece model. Raises InputError if it is damaged."""
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        except _REFUSED as error:  # ValueError: of a token that is not UTF-8
            reason = one_line(str(error).removeprefix("INTERNAL: "), 120)
            raise InputError(f"the SentencePiece model is damaged ({reason})") from error
        self.vocab_size = self._processor.vocab_size()
        ids = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        bos, eos, pad = (i if i >= 0 else None for i in ids)
        self.special = SpecialIds(bos, eos, pad)
        self._cached_bytes = functools.cache(self._find_bytes)
        # Models of other makers put a space before every text.
        self._adds_space = self._processor.encode("a", out_type=str)[:1] != ["a"]

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids. Raises InputError for half a surrogate pair."""
        check_text(text)
        # In blocks of whole lines, which no token crosses: a long text needs less memory.
        ids = [np.zeros(0, np.int32)]
        start = 0
        while start < len(text):
            end = start + _BLOCK_LENGTH
            end = text.rfind("\n", start, end) + 1 or end
            before = text[start - 1 : start] if self._adds_space else ""
            block = self._processor.encode(before + text[start:end])
            ids.append(np.array(block[len(self._processor.encode(before)) :], np.int32))
            start = end
        return np.concatenate(ids)

    def encode_after(self, text: str, before: str) -> np.ndarray:
        """[n] int32 ids of a text that follows another; `before` is the end of that."""
        if not self._adds_space:
            return self.encode(text)
        first = before[-1:] or "\n"
        return self.encode(first + text)[len(self._processor.encode(first)) :]

    def decode(self, ids: ArrayLike) -> str:
        """Text of integer ids; bytes that are not UTF-8 and unknown ids become U+FFFD."""
        ids = np.asarray(ids, np.int64).ravel()
        known = (ids >= 0) & (ids < self.vocab_size)
        if known.all():
            return self._processor.decode(ids.tolist())
        cuts = np.flatnonzero(np.diff(known)) + 1
        return "".join(
            self._processor.decode(run.tolist()) if self._is_known(run[0]) else _UNKNOWN * len(run)
            for run in np.split(ids, cuts)
        )

    def token_bytes(self, i: int) -> bytes | None:
        return self._cached_bytes(i)

    def _find_bytes(self, i) -> bytes | None:
        if not self._is_known(i) or not self._processor.is_byte(i):
            return None
        return bytes([int(self._processor.id_to_piece(i)[3:5], 16)])

    def _is_known(self, i):
        return 0 <= i < self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self._model).decode()}


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, *, threads: int = 1
) -> SentencePieceTokenizer:
    """Trains BPE on documents, the same model every time.

    Args:
        documents: text; of more than 16 million characters every second, third ... line is read.
        vocab_size: ids.
        threads: used in training; the model's file records them.

    Raises:
        InputError: the text cannot support vocab_size.
    """
    import sentencepiece

    documents = list(documents)
    for text in documents:
        check_text(text)
    stride = max(-(-sum(map(len, documents)) // _SAMPLE), 1)
    lines = (line for text in documents for line in text.split("\n"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(lines, 0, None, stride),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",  # with the next two, decode(encode(x)) == x
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=2**30,  # longer lines would be left out in silence
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=threads if stride == 1 else THREADS,
            minloglevel=4,
        )
    except _REFUSED as error:
        raise InputError(f"data.vocab_size={vocab_size} {_explain_vocab_size(error)}") from error
    return SentencePieceTokenizer(model.getvalue())


def _explain_vocab_size(error):
    """What SentencePiece's message means for data.vocab_size."""
    if most := re.search(r"too high .* <= (\d+)", str(error)):
        return f"is more than this text supports; set at most {most[1]}"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return f"cannot hold the bytes and characters of this text; set at least {least[1]}"
    return f"does not suit SentencePiece ({error}); set a number such as 4000, and a longer text"
