"""Token ids to batches: shuffled windows, contiguous tracks, and the windows of an evaluation.

Documents lie end to end in one stream of N tokens. A row of a batch is a position s in it: the
inputs are tokens s .. s+T-1, the targets s+1 .. s+T. A target in another document than its input,
or past the end, is -1 and does not count.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gt_jax.data.tokenizers import CorpusTokens
from gt_jax.errors import InputError


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


def make_batches(
    tokens: Iterable[np.ndarray], *, order: str, batch_size: int, seq_len: int, seed: int = 0
) -> "Batches":
    """Endless training batches.

    Args:
        tokens: one [n] int32 array a document, e.g. `CorpusTokens.train`.
        order: "windows": every epoch cuts the stream into windows, beginning at another token, and
            shuffles them, both by (seed, epoch) alone; no row continues another. "tracks":
            batch_size equal stretches of the stream are read side by side, each batch beginning
            where the one before ended; the start of an epoch and of a document resets a row.
        batch_size: rows, B.
        seq_len: tokens in a row, T.
        seed: of the windows.

    Returns:
        A Batches iterator. What does not fill a batch at the end of an epoch is left out; windows
        repeat in a batch when there are fewer than B.

    Raises:
        InputError: the order is unknown, or the text is too short.
    """
    if order not in _PLANS:
        raise InputError(f"data.order={order!r} must be one of {', '.join(_PLANS)}")
    stream = _Stream(tokens)
    rows = batch_size if order == "tracks" else 1
    if stream.size < rows * (seq_len + 1):
        lower = "it or train.batch_size" if order == "tracks" else "it"
        raise InputError(
            f"train.seq_len={seq_len} needs {rows * (seq_len + 1)} training tokens for data.order="
            f"{order} and data.source has {stream.size}; lower {lower}, or name a longer text"
        )
    return Batches(stream, order, batch_size, seq_len, seed)


class Batches:
    """Iterator over training batches whose position can be saved and restored to the bit.

    Attributes:
        tokens_per_epoch: targets in the first epoch; another may have one batch more or less.
    """

    def __init__(self, stream: "_Stream", order: str, batch_size: int, seq_len: int, seed: int):
        self._stream = stream
        self._setting = {
            "data.order": order,
            "train.batch_size": batch_size,
            "train.seq_len": seq_len,
            "seed": seed,
            "training tokens": stream.size,
        }
        self._plan = lambda epoch: _PLANS[order](stream.size, batch_size, seq_len, [seed, epoch])
        self._seq_len = seq_len
        self._carried = order == "tracks"
        self._go_to(epoch=0, index=0)
        self._crossing = stream.crosses(self._starts, seq_len) if self._carried else stream.several
        self.tokens_per_epoch = self._starts.size * seq_len

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch."""
        if self._index == len(self._starts):
            self._go_to(self._epoch + 1, 0)
        starts = self._starts[self._index]
        resets = self._index == 0 or not self._carried
        self._index += 1
        return self._stream.batch(starts, self._seq_len, resets=resets, crossing=self._crossing)

    def state(self) -> dict[str, int | str]:
        """The position, and the setting it is valid for: a dict of ints and strings."""
        return {**self._setting, "epoch": self._epoch, "index": self._index}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state()` gave.

        Raises:
            InputError: the position belongs to another setting.
        """
        for name, value in self._setting.items():
            saved = state.get(name)
            if saved != value:
                raise InputError(
                    f"{name}={value} differs from the checkpoint's {saved}; resume with {saved}, or"
                    " begin in another folder"
                )
        self._go_to(state["epoch"], state["index"])

    def _go_to(self, epoch, index):
        self._epoch, self._index = epoch, index
        self._starts = self._plan(epoch)  # [batches, B]


def evaluation_batches(
    tokens: Iterable[np.ndarray],
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int = 0,
    carry: bool = False,
) -> list[Batch]:
    """Batches that count every target of a split once.

    Args:
        tokens: one [n] int32 array a document, e.g. `CorpusTokens.validation`.
        batch_size: rows, B. With carry=False the summed loss does not depend on it.
        seq_len: tokens in a row, T.
        max_tokens: stop after this many tokens of the stream; 0 takes all.
        carry: False makes every row a window of its own, in order. True makes the rows B tracks
            whose state the next batch continues (see `Batch.resets`).

    Returns:
        A list of Batch, the last filled up with targets of -1.

    Raises:
        InputError: fewer than two tokens.
    """
    stream = _Stream(tokens, max_tokens + 1 if max_tokens else None)
    last = stream.size - 1  # has no target
    if last < 1:
        raise InputError(
            f"data.source has {stream.size} validation tokens and at least 2 are needed; name a"
            " longer text or raise data.validation_fraction"
        )
    row = np.arange(batch_size)
    if carry:
        track = -(-last // batch_size)
        starts = row * track + np.arange(0, track, seq_len)[:, None]  # [batches, B]
        stops = np.minimum((row + 1) * track, last)
    else:
        batches = -(-last // (batch_size * seq_len))
        starts = np.arange(batches * batch_size).reshape(batches, batch_size) * seq_len
        stops = np.full(batch_size, last)
    crossing = stream.crosses(starts, seq_len)
    return [
        stream.batch(s, seq_len, resets=i == 0 or not carry, crossing=crossing, stops=stops)
        for i, s in enumerate(starts)
    ]


def track_split(
    tokens: CorpusTokens, batch_size: int, validation_fraction: float = 0.1
) -> CorpusTokens:
    """Split every track instead of the corpus: the ends of all batch_size tracks validate.

    The text of both splits, cut to a multiple of B, becomes B tracks; the first part of each trains
    and the rest validates. The validation text therefore depends on the batch size: compare losses
    at one batch size only. Tiny Shakespeare with B = 64 gives tracks of 17 428 characters.

    Args:
        tokens: CorpusTokens.
        batch_size: tracks, B; batch with order="tracks" and the same B to follow them.
        validation_fraction: of each track.

    Returns:
        CorpusTokens of B "documents" in each split. Borders of true documents are forgotten.

    Raises:
        InputError: a track would be shorter than 4 tokens.
    """
    stream = np.concatenate([*tokens.train, *tokens.validation])
    track = len(stream) // batch_size
    cut = int(track * (1 - validation_fraction))
    if cut < 2 or track - cut < 2:
        raise InputError(
            f"train.batch_size={batch_size} cuts the {len(stream)} tokens of data.source into"
            f" tracks of {track}, too short to split; lower it or name a longer text"
        )
    tracks = stream[: batch_size * track].reshape(batch_size, track)
    return CorpusTokens(tuple(tracks[:, :cut]), tuple(tracks[:, cut:]))


class _Stream:
    """Documents end to end."""

    def __init__(self, documents, size=None):
        documents = list(documents)
        lengths = [len(d) for d in documents]
        self._tokens = np.concatenate([np.zeros(0, np.int32), *documents])[:size]  # [N]
        self._document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:size]  # [N]
        self.size = len(self._tokens)
        self.several = self.size > 0 and self._document[0] != self._document[-1]

    def crosses(self, starts, seq_len):
        """Whether any row of inputs that begins at one of starts enters another document."""
        first, last = (np.minimum(s, self.size - 1) for s in (starts, starts + seq_len - 1))
        return bool((self._document[first] != self._document[last]).any())

    def batch(self, starts, seq_len, *, resets, crossing, stops=None):
        """The rows that begin at starts [B]; targets of inputs from stops [B] on do not count."""
        place = starts[:, None] + np.arange(seq_len + 1)  # [B, T + 1]
        within = np.minimum(place, self.size - 1)
        tokens, document = self._tokens[within], self._document[within]
        counts = document[:, 1:] == document[:, :-1]
        if stops is not None:
            counts &= place[:, :-1] < stops[:, None]
        before = self._document[np.maximum(within[:, 0] - 1, 0)]
        return Batch(
            inputs=tokens[:, :-1],
            targets=np.where(counts, tokens[:, 1:], np.int32(-1)),
            segment_ids=document[:, :-1] if crossing else None,
            resets=(document[:, 0] != before) | resets,
        )


def _windows(size, batch_size, seq_len, seed):
    """[batches, B] starts of shuffled windows, the first window at a random place."""
    rng = np.random.default_rng(seed)
    phase = rng.integers(min(seq_len, size - seq_len))
    starts = phase + seq_len * rng.permutation((size - 1 - phase) // seq_len)
    batches = max(len(starts) // batch_size, 1)
    return np.resize(starts, (batches, batch_size))


def _tracks(size, batch_size, seq_len, seed):
    """[batches, B] starts along B tracks; the same in every epoch."""
    track = size // batch_size
    steps = (track - 1) // seq_len  # the last target lies in its own track
    return np.arange(batch_size) * track + np.arange(steps)[:, None] * seq_len


_PLANS = {"windows": _windows, "tracks": _tracks}
