"""Inputs for tests and benchmarks: named decay regimes, from typical to as hard as they get.

RWKV-6 bounds its log decay only from above and Mamba-2 its step size only by what it learns, so
both recurrences must be right for every regime here, values and gradients alike.
"""

import numpy as np

# Lengths around the borders of chunks, blocks and groups of chunks.
LENGTHS = (1, 2, 15, 63, 64, 65, 127, 1000)


def _some(rng, shape, share, inside, outside):
    """`inside` on a random share of the entries, `outside` elsewhere."""
    return np.where(rng.random(shape) < share, inside, outside)


def _typical(rng, shape):
    return -np.exp(rng.normal(-2, 1.5, shape))


def _eight_in_a_row(rng, shape):
    w = _typical(rng, shape)
    w[:, shape[1] // 3 : shape[1] // 3 + 8] = -14
    return w


def _one_extreme_channel(rng, shape):
    w = -np.exp(rng.normal(-5, 1, shape))
    w[..., 0] = -200
    return w


# name -> function of (rng, [B, T, H, K]) giving the log decay of WKV6
WKV6_REGIMES = {
    "near_one": lambda rng, shape: -np.exp(rng.normal(-8, 1, shape)),
    "slow": lambda rng, shape: -np.exp(rng.normal(-5, 1, shape)),
    "typical": _typical,
    "strong": lambda rng, shape: -np.logaddexp(0, -rng.normal(size=shape)) / 0.1,
    "hard_resets": lambda rng, shape: _some(rng, shape, 0.02, -60, _typical(rng, shape)),
    "minus_1e4": lambda rng, shape: _some(rng, shape, 0.02, -1e4, _typical(rng, shape)),
    "minus_inf": lambda rng, shape: _some(rng, shape, 0.02, -np.inf, _typical(rng, shape)),
    "eight_in_a_row": _eight_in_a_row,
    "no_decay": lambda rng, shape: np.zeros(shape),
    "constants": lambda rng, shape: np.broadcast_to(-np.geomspace(1e-6, 50, shape[-1]), shape),
    "one_extreme_channel": _one_extreme_channel,
}


def _log_uniform(rng, shape, low, high):
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _mamba_rate(rng, heads):
    return -rng.uniform(1, 16, heads)


def _small_step(rng, shape):
    return _log_uniform(rng, shape, 1e-3, 0.1)


# name -> function of (rng, [B, T, H]) giving SSD's step size dt and decay rate A [H]
SSD_REGIMES = {
    "near_one": lambda rng, s: (_log_uniform(rng, s, 1e-5, 1e-4), _mamba_rate(rng, s[-1])),
    "typical": lambda rng, s: (_small_step(rng, s), _mamba_rate(rng, s[-1])),
    "wide": lambda rng, s: (_log_uniform(rng, s, 1e-3, 3), _mamba_rate(rng, s[-1])),
    "zero_rows": lambda rng, s: (
        _some(rng, s, 0.3, 0, _small_step(rng, s)),
        _mamba_rate(rng, s[-1]),
    ),
    "huge_step": lambda rng, s: (np.full(s, 10.0), np.full(s[-1], -16.0)),
    "some_huge_steps": lambda rng, s: (
        _some(rng, s, 0.05, 1e3, _small_step(rng, s)),
        _mamba_rate(rng, s[-1]),
    ),
}


def wkv6_inputs(
    regime: str,
    batch: int,
    length: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """Float64 (r, k, v, w, u, initial_state) with the log decay of a named regime."""
    rng = np.random.default_rng(seed)
    r, k = rng.normal(size=(2, batch, length, heads, key_size))
    v = rng.normal(size=(batch, length, heads, value_size))
    w = WKV6_REGIMES[regime](rng, (batch, length, heads, key_size))
    u = rng.normal(size=(heads, key_size))
    state = rng.normal(size=(batch, heads, key_size, value_size))
    return r, k, v, w, u, state


def ssd_inputs(
    regime: str,
    batch: int,
    length: int,
    heads: int,
    groups: int,
    head_size: int,
    state_size: int,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """Float64 (x, dt, A, B, C, D, initial_state) with the decay of a named regime."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, heads, head_size))
    dt, A = SSD_REGIMES[regime](rng, (batch, length, heads))
    B, C = rng.normal(size=(2, batch, length, groups, state_size))
    D = rng.normal(size=heads)
    state = rng.normal(size=(batch, heads, head_size, state_size))
    return x, dt, A, B, C, D, state


def segments(batch: int, length: int, *, mean_length: int = 20, seed: int = 0) -> np.ndarray:
    """[B, T] int32 ids of segments of random lengths, one token long at times."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.random((batch, length)) < 1 / mean_length, axis=1).astype(np.int32)
