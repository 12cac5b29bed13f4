"""Tokens in shards on disk as one stream of documents, and shuffled windows of it.

Nothing is held in memory: a window is copied from its shard when a batch needs it, and the place of
every window follows from (seed, number of the window) alone.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gt_jax.data.shards import Shard, release

_RELEASE_AFTER = 1 << 28  # bytes that were read, and may be mapped
_READ_AHEAD = 1 << 16  # bytes that one read may map besides its own


class Span(NamedTuple):
    """Tokens start to stop of a shard; a document ends at `stop` in any case if `closes`."""

    shard: Shard
    start: int
    stop: int
    closes: bool


class MappedTokens(Sequence[np.ndarray]):
    """Documents end to end in shards: a sequence of [n] int32 arrays that are read when asked for.

    Attributes:
        size: tokens.
        parts: (first token, tokens, weight) of each source in a mixture; weights add up to 1.
    """

    def __init__(self, spans: Sequence[Span], parts: Sequence[tuple[int, int, float]] = ()):
        self._spans = [span for span in spans if span.stop > span.start]
        lengths = [span.stop - span.start for span in self._spans]
        self._offsets = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self.size = self._offsets[-1]
        self.parts = tuple(parts) or ((0, self.size, 1.0),)
        # Of each span: the number of its first end among its shard's, the ends before it in the
        # stream, and whether a document ends with it.
        self._first_ends, self._ends_before, self._ended = [], [0], []
        for span in self._spans:
            shard = span.shard
            first = shard.ends_until(span.start) if span.start else 0
            whole = span.stop == shard.tokens
            last = shard.ends if whole else shard.ends_until(span.stop)
            ended = not shard.is_open if whole else last > 0 and shard.end(last - 1) == span.stop
            self._first_ends.append(first)
            self._ends_before.append(
                self._ends_before[-1] + last - first + (span.closes and not ended)
            )
            self._ended.append(span.closes or ended)
        self._mapped = 0

    @classmethod
    def of_shards(cls, shards: Sequence[Shard]) -> "MappedTokens":
        """All documents of some shards; the last document ends with the last shard."""
        last = len(shards) - 1
        return cls([Span(s, 0, s.tokens, n == last) for n, s in enumerate(shards)])

    @classmethod
    def mixture(cls, sources: Sequence["MappedTokens"], weights: Sequence[float]) -> "MappedTokens":
        """Several sources end to end, whose windows are drawn in proportion to weights."""
        spans, parts = [], []
        first, total = 0, sum(weights)
        for source, weight in zip(sources, weights):
            spans += [*source._spans[:-1], source._spans[-1]._replace(closes=True)]
            parts.append((first, source.size, weight / total))
            first += source.size
        return cls(spans, parts)

    def __len__(self) -> int:
        """How many documents there are."""
        return self._ends_before[-1] + (self.size > 0 and not self._ended[-1])

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start = self._end(i - 1) if i else 0
        ids = np.empty(self._end(i) - start, np.int32)
        self._copy(start, ids, np.zeros_like(ids))
        return ids

    def between(self, start: int, stop: int) -> "MappedTokens":
        """Tokens start to stop of the stream, as one source."""
        spans = []
        for span, offset in zip(self._spans, self._offsets):
            first = max(span.start, span.start + start - offset)
            last = min(span.stop, span.start + stop - offset)
            spans.append(span._replace(start=first, stop=max(first, last)))
        return MappedTokens(spans)

    def head(self, size: int) -> "MappedTokens":
        """The first `size` tokens; of a mixture, of every source its share."""
        if size >= self.size:
            return self
        taken = [
            self.between(first, first + min(length, max(round(size * weight), 1)))
            for first, length, weight in self.parts
        ]
        if len(taken) == 1:
            return taken[0]
        return MappedTokens.mixture(taken, [weight for *_, weight in self.parts])

    def split(self, fraction: float) -> tuple["MappedTokens", "MappedTokens"]:
        """(the rest, the last fraction) of the documents, or of the tokens of a lone document."""
        count = len(self)
        length = self.size if count == 1 else count
        cut = min(max(int(length * (1 - fraction)), 1), length - 1)
        place = cut if count == 1 else self._end(cut - 1)
        return self.between(0, place), self.between(place, self.size)

    def digest(self) -> bytes:
        """A hash of the tokens and of where documents end, from the checksums of the shards."""
        spans = [(s.shard.sha256, s.start, s.stop, s.closes) for s in self._spans]
        return hashlib.sha256(repr(spans).encode()).digest()

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the stream.

        Args:
            starts: [B], where each row begins.
            length: tokens in a row. Places before the stream and behind it repeat its ends.

        Returns:
            tokens [B, length] int32; documents [B, length] int32, counted up within each row.
        """
        tokens = np.empty((len(starts), length), np.int32)
        begins = np.zeros((len(starts), length), np.int32)  # 1 where a document begins
        whole = {}  # span -> its rows
        for row, start in enumerate(starts.tolist()):
            i = bisect_right(self._offsets, start) - 1
            if 0 <= i < len(self._spans) and start + length <= self._offsets[i + 1]:
                whole.setdefault(i, []).append(row)
                continue
            if start >= 0 and start + length <= self.size:
                self._copy(start, tokens[row], begins[row])
                continue
            inside = np.clip(np.arange(start, start + length), 0, self.size - 1)
            first, last = int(inside[0]), int(inside[-1]) + 1
            own, own_begins = (np.zeros(last - first, np.int32) for _ in range(2))
            self._copy(first, own, own_begins)
            tokens[row] = own[inside - first]
            begins[row, 1:] = own_begins[inside - first][1:] * (np.diff(inside) > 0)
        for i, rows in whole.items():
            span = self._spans[i]
            self._note_mapped(len(rows), length)
            places = starts[rows] + (span.start - self._offsets[i])
            span.shard.read_rows(places, tokens, begins, rows)
        return tokens, begins.cumsum(axis=1, dtype=np.int32)

    def _copy(self, start, tokens, begins):
        """Copy the stream from `start` on to a row, and mark where documents begin.

        A document that begins with the row itself may have no mark.
        """
        self._note_mapped(1, len(tokens))
        i, at = bisect_right(self._offsets, start) - 1, 0
        while at < len(tokens):
            span = self._spans[i]
            first = span.start + start + at - self._offsets[i]
            last = min(first + len(tokens) - at, span.stop)
            ids, ends = span.shard.read(first, last)
            tokens[at : at + last - first] = ids
            if len(ends):
                begins[ends - first + at] = 1
            at += last - first
            if self._ended[i] and at < len(tokens):
                begins[at] = 1
            i += 1

    def _note_mapped(self, rows, length):
        """Keep count of what reads map, and unmap it in time."""
        self._mapped += rows * (4 * length + _READ_AHEAD)
        if self._mapped > _RELEASE_AFTER:
            self._mapped = 0
            release()

    def _end(self, i: int) -> int:
        """Where document i ends in the stream."""
        if i >= self._ends_before[-1]:
            return self.size
        n = bisect_right(self._ends_before, i) - 1
        span, own = self._spans[n], self._first_ends[n] + i - self._ends_before[n]
        if own < span.shard.ends:
            end = span.shard.end(own)
            if end <= span.stop:
                return end - span.start + self._offsets[n]
        return self._offsets[n + 1]
