"""Token ids to batches: shuffled windows, contiguous tracks, and the windows of an evaluation.

Documents lie end to end in one stream of N tokens, in memory or in shards on disk. A row of a batch
is a position s in it: the inputs are tokens s .. s+T-1, the targets s+1 .. s+T. A target in another
document than its input, or past the end, is -1 and does not count.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gt_jax.data.mapped import MappedTokens
from gt_jax.data.order import MixedWindows
from gt_jax.data.streams import Batch, MappedStream, Steps, Stream
from gt_jax.data.tokenizers import CorpusTokens
from gt_jax.errors import InputError


def make_batches(
    tokens: Iterable[np.ndarray],
    *,
    order: str,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    rows: slice = slice(None),
) -> "Batches":
    """Endless training batches.

    Args:
        tokens: one [n] int32 array a document, e.g. `CorpusTokens.train`; MappedTokens stay on
            disk, and of those of a mixture every source has its share of the windows.
        order: "windows": every epoch cuts the stream into windows, beginning at another token, and
            shuffles them, both by (seed, epoch) alone; no row continues another. "tracks":
            batch_size equal stretches of the stream are read side by side, each batch beginning
            where the one before ended; the start of an epoch and of a document resets a row.
        batch_size: rows, B.
        seq_len: tokens in a row, T.
        seed: of the windows.
        rows: of each batch, those that are made; a host may need no others.

    Returns:
        A Batches iterator. What does not fill a batch at the end of an epoch is left out; windows
        repeat in a batch when there are fewer than B.

    Raises:
        InputError: the order is unknown, or the text is too short.
    """
    if order not in _PLANS:
        raise InputError(f"data.order={order!r} must be one of {', '.join(_PLANS)}")
    mapped = isinstance(tokens, MappedTokens)
    stream = MappedStream(tokens) if mapped else Stream(tokens)
    sizes = [size for _, size, _ in tokens.parts] if mapped else [stream.size]
    if order == "tracks" and len(sizes) > 1:
        raise InputError(
            "data.order=tracks reads one source and data.source names several; set "
            "data.order=windows"
        )
    least = seq_len + 1 if order == "windows" else batch_size * (seq_len + 1)
    if min(sizes) < least:
        lower = "it or train.batch_size" if order == "tracks" else "it"
        raise InputError(
            f"train.seq_len={seq_len} needs {least} training tokens for data.order="
            f"{order} and data.source has {min(sizes)}; lower {lower}, or name a longer text"
        )
    if mapped and order == "windows":
        windows = MixedWindows(tokens.parts, batch_size, seq_len, seed)
        plan = windows.epoch
    else:
        plan = lambda epoch: _PLANS[order](stream.size, batch_size, seq_len, [seed, epoch])
    return Batches(stream, plan, order, batch_size, seq_len, seed, rows)


class Batches:
    """Iterator over training batches whose position can be saved and restored to the bit.

    Attributes:
        tokens_per_epoch: targets in the first epoch; another may have one batch more or less.
    """

    def __init__(
        self,
        stream: Stream | MappedStream,
        plan: Callable[[int], Any],
        order: str,
        batch_size: int,
        seq_len: int,
        seed: int,
        rows: slice,
    ):
        self._stream, self._rows = stream, rows
        self._setting = {
            "data.order": order,
            "train.batch_size": batch_size,
            "train.seq_len": seq_len,
            "seed": seed,
            "training tokens": stream.size,
        }
        self._plan = plan  # epoch -> [batches, B] starts
        self._seq_len = seq_len
        self._carried = order == "tracks"
        self._go_to(epoch=0, index=0)
        self._crossing = stream.crosses(self._starts, seq_len) if self._carried else stream.several
        self.tokens_per_epoch = len(self._starts) * batch_size * seq_len

    def __iter__(self):
        return self

    def __next__(self):
        """The next Batch."""
        if self._index == len(self._starts):
            self._go_to(self._epoch + 1, 0)
        starts = self._starts[self._index][self._rows]
        resets = self._index == 0 or not self._carried
        self._index += 1
        return self._stream.batch(starts, self._seq_len, resets=resets, crossing=self._crossing)

    def state(self) -> dict[str, int | str]:
        """The position, and the setting it is valid for: a dict of ints and strings."""
        return {**self._setting, "epoch": self._epoch, "index": self._index}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state()` gave.

        Raises:
            InputError: the position belongs to another setting, or is none.
        """
        for name, value in self._setting.items():
            saved = state.get(name)
            if saved != value:
                raise InputError(
                    f"{name}={value} differs from the checkpoint's {saved}; resume with {saved}, or"
                    " begin in another folder"
                )
        epoch, index = state.get("epoch"), state.get("index")
        if not all(isinstance(x, int) and 0 <= x < 2**31 for x in (epoch, index)):
            raise InputError(f"epoch={epoch!r}, index={index!r} is no place in the text")
        self._go_to(epoch, index)

    def starts(self, state: Mapping[str, Any]) -> np.ndarray:
        """[B] places in the stream where the rows of the batch before a position begin."""
        return self._plan(state["epoch"])[state["index"] - 1][self._rows]

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
    rows: slice = slice(None),
) -> Sequence[Batch]:
    """Batches that count every target of a split once.

    Args:
        tokens: one [n] int32 array a document, e.g. `CorpusTokens.validation`.
        batch_size: rows, B. With carry=False the summed loss does not depend on it.
        seq_len: tokens in a row, T.
        max_tokens: stop after this many tokens of the stream; 0 takes all.
        carry: False makes every row a window of its own, in order. True makes the rows B tracks
            whose state the next batch continues (see `Batch.resets`).
        rows: of each batch, those that are made; a host may need no others.

    Returns:
        A list of Batch, the last filled up with targets of -1; of MappedTokens a sequence that
        makes each when asked for it.

    Raises:
        InputError: fewer than two tokens.
    """
    stop = max_tokens + 1 if max_tokens else None
    if isinstance(tokens, MappedTokens):
        stream = MappedStream(tokens.head(stop) if stop else tokens)
    else:
        stream = Stream(tokens, stop)
    last = stream.size - 1  # has no target
    if last < 1:
        raise InputError(
            f"data.source has {stream.size} validation tokens and at least 2 are needed; name a"
            " longer text or raise data.validation_fraction"
        )
    row = np.arange(batch_size)
    if carry:
        track = -(-last // batch_size)
        starts = Steps(row * track, seq_len, -(-track // seq_len))
        stops = np.minimum((row + 1) * track, last)
    else:
        size = batch_size * seq_len
        starts = Steps(row * seq_len, size, -(-last // size))
        stops = np.full(batch_size, last)
    batches = _Evaluation(stream, starts, seq_len, carry, stops, rows)
    return batches if isinstance(stream, MappedStream) else list(batches)


class _Evaluation(Sequence[Batch]):
    """The batches of an evaluation, made when asked for."""

    def __init__(self, stream, starts, seq_len, carry, stops, rows):
        self._stream, self._starts, self._seq_len = stream, starts, seq_len
        self._carry, self._stops, self._rows = carry, stops, rows
        self._crossing = stream.crosses(starts, seq_len)

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._stream.batch(
            self._starts[i][self._rows],
            self._seq_len,
            resets=i == 0 or not self._carry,
            crossing=self._crossing,
            stops=self._stops[self._rows],
        )


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
    return Steps(np.arange(batch_size) * track, seq_len, steps)


_PLANS = {"windows": _windows, "tracks": _tracks}
