"""Inputs of the kernels of linear scans, and what they have to give, in float64."""

import jax.numpy as jnp
import numpy as np

# Of an array's largest number. bfloat16 rounds what it holds; some states outlive 1000 tokens.
NEAR_LASTING = {"bfloat16": 2**-8, "float32": 1e-5}


def case(B, T, C, seed=0):
    """Decay with exact zeros and ones among it, x, a state, and the cotangent of s; float32."""
    rng = np.random.default_rng(seed)
    decay = rng.choice([0, 1, 0.5, 0.999], (B, T, C), p=[0.03, 0.2, 0.27, 0.5])
    x, g = rng.normal(size=(2, B, T, C))
    return [jnp.asarray(z, jnp.float32) for z in (decay, x, rng.normal(size=(B, C)), g)]


def in_float64(decay, x, state, g):
    """s and the gradients of decay, x and the state, one token at a time."""
    decay, x, state, g = (np.float64(z) for z in (decay, x, state, g))
    s, after = np.empty_like(x), state
    for t in range(x.shape[1]):
        after = s[:, t] = decay[:, t] * after + x[:, t]
    before = np.concatenate([state[:, None], s[:, :-1]], axis=1)
    dx, u = np.empty_like(x), np.zeros_like(state)
    for t in reversed(range(x.shape[1])):
        dx[:, t] = g[:, t] + u
        u = decay[:, t] * dx[:, t]
    return s, dx * before, dx, u


def gated_in_float64(gates, head, state, resets, d_score, d_last):
    """s . head and the last s of a minGRU, and the gradients of gates, head and state."""
    candidate, update = np.split(np.float64(gates), 2, axis=-1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    z, below, stays = sigmoid(update), sigmoid(candidate), 1 - np.float64(resets)[..., None]
    value = np.where(candidate >= 0, candidate + 0.5, below)
    head = np.float64(head)
    g = np.float64(d_score)[..., None] * head
    g[:, -1] += d_last
    s, d_decay, dx, du = in_float64((1 - z) * stays, z * value, state, g)
    d_update = (dx * value - d_decay * stays) * z * (1 - z)
    d_candidate = dx * z * np.where(candidate >= 0, 1, below * (1 - below))
    d_head = np.einsum("bt,btc->c", np.float64(d_score), s)
    return s @ head, s[:, -1], np.concatenate([d_candidate, d_update], axis=-1), d_head, du


def memory_in_float64(scores, c, bias, state, resets, ds, d_last):
    """s, the last s, and the gradients of scores, c, bias and state of a ParallelScan's memory."""
    scores, c, ds, d_last = (np.float64(z) for z in (scores, c, ds, d_last))
    forget, read = np.split(scores, 2, axis=-1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    a, i, stays = sigmoid(forget + bias), sigmoid(read), 1 - np.float64(resets)[..., None]
    g = ds.copy()
    g[:, -1] += d_last
    s, d_decay, dx, du = in_float64(a * stays, (1 - a) * i * c, state, g)
    d_forget = (d_decay * stays - dx * i * c) * a * (1 - a)
    d_read = dx * (1 - a) * c * i * (1 - i)
    d_scores = np.concatenate([d_forget, d_read], axis=-1)
    return s, s[:, -1], d_scores, dx * (1 - a) * i, d_forget.sum((0, 1)), du


def scores_of(shape, dtype, first, sign):
    """[B, T, 2 C] scores of gates. From `first` on, C are those that keep the state where they are
    of this sign; every other one of them keeps it long."""
    B, T, C = shape
    rng = np.random.default_rng(0)
    largest = 30 if dtype == "float32" else 1  # rounding s would be a large part of its neighbours
    scores = rng.normal(size=(B, T, 2 * C)) * rng.choice([1, largest], (B, T, 1), p=[0.9, 0.1])
    lasting = sign * (6 + rng.normal(size=(B, T, C // 2)) ** 2)
    scores[..., first + 1 : first + C : 2] = lasting
    return jnp.asarray(scores, dtype)


def resets_of(B, T):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.random((B, T)) < 2 / T, jnp.int32).at[:, 0].set(0)


def lasting_case(shape):
    """`case`, of which every other channel keeps its state long."""
    decay, *others = case(*shape)
    rng = np.random.default_rng(1)
    slow = 1 - 0.004 * rng.random(shape) * (rng.random(shape) < 0.5)
    return [jnp.where(np.arange(shape[2]) % 2, jnp.float32(slow), decay), *others]


def check(found, wanted, near):
    for z, expected in zip(found, wanted, strict=True):
        error = near * np.abs(expected).max()
        np.testing.assert_allclose(np.float64(z), expected, rtol=0, atol=error)
