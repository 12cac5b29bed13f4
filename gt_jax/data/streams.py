"""Documents end to end in one stream of tokens, in memory or on disk, and rows of it as a Batch."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gt_jax.data.mapped import MappedTokens


class Batch(NamedTuple):
    """B rows of T tokens.

    Attributes:
        inputs: [B, T] int32 token ids.
        targets: [B, T] int32, the next token; -1 does not count.
        segment_ids: [B, T] int32, another number for another document; None where no row of any
            batch crosses from one document to the next.
        resets: [B] bool, True where a carried state must be zeroed before this row.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray | None
    resets: np.ndarray


class Steps:
    """Where the rows of batches begin, each batch one step behind the one before."""

    def __init__(self, first: np.ndarray, step: int, count: int):
        """Args:
        first: [B] starts of batch 0.
        step: tokens from a batch to the next.
        count: batches.
        """
        self._first, self._step, self._count = first, step, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int | np.ndarray) -> np.ndarray:
        """[B] starts of batch i; [n, B] of batches [n, 1]."""
        return self._first + i * self._step


class Stream:
    """A stream in memory.

    Attributes:
        size: tokens.
        several: whether there is more than one document.
    """

    def __init__(self, documents: Iterable[np.ndarray], size: int | None = None):
        """Args:
        documents: [n] int32 ids of each.
        size: tokens to take; None for all.
        """
        documents = list(documents)
        lengths = [len(d) for d in documents]
        self._tokens = np.concatenate([np.zeros(0, np.int32), *documents])[:size]  # [N]
        self._document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:size]  # [N]
        self.size = len(self._tokens)
        self.several = self.size > 0 and self._document[0] != self._document[-1]

    def crosses(self, starts: Steps, seq_len: int) -> bool:
        """Whether any row of inputs that begins at one of starts enters another document."""
        first = starts[np.arange(len(starts))[:, None]]  # [batches, B]
        first, last = (np.minimum(s, self.size - 1) for s in (first, first + seq_len - 1))
        return bool((self._document[first] != self._document[last]).any())

    def batch(
        self,
        starts: np.ndarray,
        seq_len: int,
        *,
        resets: bool,
        crossing: bool,
        stops: np.ndarray | None = None,
    ) -> Batch:
        """The rows that begin at starts [B]; targets of inputs from stops [B] on do not count."""
        place = starts[:, None] + np.arange(seq_len + 1)  # [B, T + 1]
        within = np.minimum(place, self.size - 1)
        tokens, document = self._tokens[within], self._document[within]
        before = self._document[np.maximum(within[:, 0] - 1, 0)]
        return _batch(tokens, document, before, place, resets, crossing, stops)


class MappedStream:
    """A stream on disk; as Stream, but document numbers count from the start of every row."""

    def __init__(self, tokens: MappedTokens):
        self._tokens, self.size, self.several = tokens, tokens.size, len(tokens) > 1

    def crosses(self, starts: Steps, seq_len: int) -> bool:
        """Whether a row may enter another document."""
        return self.several

    def batch(
        self,
        starts: np.ndarray,
        seq_len: int,
        *,
        resets: bool,
        crossing: bool,
        stops: np.ndarray | None = None,
    ) -> Batch:
        """As Stream.batch."""
        tokens, document = self._tokens.read(starts - 1, seq_len + 2)  # [B, T + 2]
        place = starts[:, None] + np.arange(seq_len + 1)
        document, before = document[:, 1:], document[:, 0]
        return _batch(tokens[:, 1:], document, before, place, resets, crossing, stops)


def _batch(tokens, document, before, place, resets, crossing, stops) -> Batch:
    """A Batch of tokens and their documents [B, T + 1] at places of the stream.

    before [B] is the document of the token before each row.
    """
    counts = document[:, 1:] == document[:, :-1]
    if stops is not None:
        counts &= place[:, :-1] < stops[:, None]
    return Batch(
        inputs=tokens[:, :-1],
        targets=np.where(counts, tokens[:, 1:], np.int32(-1)),
        segment_ids=document[:, :-1] if crossing else None,
        resets=(document[:, 0] != before) | resets,
    )
