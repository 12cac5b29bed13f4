"""The order of windows without a list of them: a permutation and a mixture, computed where needed.

Row r of training (batches end to end) reads a window that follows from (seed, r) alone, so that any
step is found at once, and any host can make its own rows.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from gt_jax.errors import InputError

_SLOTS = 10_000  # rows in which every source of a mixture has its share
_ROWS_AT_ONCE = 1 << 12  # whose places are computed together: NumPy takes as long for a few
_ROUNDS = 6


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A pseudorandom permutation of 0 ... size-1, at some places.

    A Feistel network on the next power of 4, walked along its cycles until it is below size
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        index: [n] integers in [0, size).
        keys: uint64, one for each round; other keys give another permutation.

    Returns:
        [n] int64 in [0, size).
    """
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    mask = np.uint64((1 << int(half)) - 1)
    out = np.asarray(index, np.uint64).copy()
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[walking] = left << half | right
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MixedWindows:
    """Starts of shuffled windows of one source or several, batch by batch, without an end.

    Every source is read in epochs of its own: each cuts it into windows, beginning at another
    token, and shuffles them.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, int, float]],
        batch_size: int,
        seq_len: int,
        seed: int,
    ):
        """Args:
            parts: (first token, tokens, weight) of each source; weights add up to 1.
            batch_size: rows, B.
            seq_len: tokens in a row, T; every source has more.
            seed: of phases, orders and the mixture.

        Raises:
            InputError: a weight is too small to have a row in 10,000.
        """
        self._parts, self._batch_size, self._seq_len, self._seed = parts, batch_size, seq_len, seed
        # Any phase leaves so many whole windows.
        self._windows = [max((size - seq_len) // seq_len, 1) for _, size, _ in parts]
        self._batches = max(sum(self._windows) // batch_size, 1)
        self._quotas = quotas([weight for *_, weight in parts])
        self._pattern = functools.lru_cache(maxsize=4)(self._make_pattern)
        self._keys = functools.lru_cache(maxsize=4 * len(parts))(self._make_keys)
        self._at_once = max(_ROWS_AT_ONCE // batch_size, 1)
        self._starts_at_once = functools.lru_cache(maxsize=2)(self._make_starts)

    def epoch(self, epoch: int) -> "_Epoch":
        """The batches from number epoch * n on, where n batches have as many rows as all sources
        together have windows: a sequence of starts [B]."""
        return _Epoch(self.starts, epoch * self._batches, self._batches)

    def starts(self, step: int) -> np.ndarray:
        """[B] int64, where the rows of batch number `step` begin; not to be written to."""
        part, place = divmod(step, self._at_once)
        return self._starts_at_once(part)[place]

    def _make_starts(self, part):
        """[batches, B], where the rows of so many batches begin."""
        shape = self._at_once, self._batch_size
        rows = part * self._at_once * self._batch_size + np.arange(shape[0] * shape[1])
        source, number = self._sources(rows)
        starts = np.empty(len(rows), np.int64)
        for k in np.unique(source).tolist():
            first, windows = self._parts[k][0], self._windows[k]
            epoch, index = np.divmod(number, windows)
            for e in np.unique(epoch[source == k]).tolist():
                own = (source == k) & (epoch == e)
                phase, keys = self._keys(k, e)
                starts[own] = first + phase + self._seq_len * permute(index[own], windows, keys)
        starts.flags.writeable = False
        return starts.reshape(shape)

    def _sources(self, rows):
        """The source [B] of each row, and how many rows before it had that source [B]."""
        if len(self._parts) == 1:
            return np.zeros(len(rows), np.int64), rows
        period, slot = np.divmod(rows, _SLOTS)
        source, number = np.empty_like(rows), np.empty_like(rows)
        for p in np.unique(period).tolist():
            pattern, rank = self._pattern(p)
            own = period == p
            source[own] = pattern[slot[own]]
            number[own] = p * self._quotas[source[own]] + rank[slot[own]]
        return source, number

    def _make_pattern(self, period):
        """The source of each slot of a period, and its rank among the slots of that source."""
        pattern = np.repeat(np.arange(len(self._quotas)), self._quotas)
        np.random.default_rng([self._seed, period]).shuffle(pattern)
        rank = np.empty(_SLOTS, np.int64)
        for k, quota in enumerate(self._quotas):
            rank[pattern == k] = np.arange(quota)
        return pattern, rank

    def _make_keys(self, k, epoch):
        """(phase of the windows, keys of their order) of source k."""
        rng = np.random.default_rng([self._seed, k, epoch])
        phase = int(rng.integers(min(self._seq_len, self._parts[k][1] - self._seq_len)))
        return phase, rng.integers(1 << 63, size=_ROUNDS, dtype=np.uint64)


class _Epoch:
    """Batches first to first + count - 1 of an endless order."""

    def __init__(self, starts: Callable[[int], np.ndarray], first: int, count: int):
        self._starts, self._first, self._count = starts, first, count

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        return self._starts(self._first + i)


def quotas(weights: Sequence[float]) -> np.ndarray:
    """[n] int64, how many of 10,000 rows each source has: the largest remainders are rounded up.

    Raises:
        InputError: a weight is too small for one.
    """
    exact = np.array(weights) / sum(weights) * _SLOTS
    out = np.floor(exact + 1e-9).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: _SLOTS - out.sum()]] += 1
    if out.min() < 1:
        small = weights[int(out.argmin())]
        raise InputError(
            f"data.source has a weight of {small:g} among {sum(weights):g}, less than one row in "
            f"{_SLOTS:,}; raise it or leave the source out"
        )
    return out
