"""The scan of the arbiters against a loop in float64: values, gradients, any length, resets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models.scans import linear_scan
from tests.models.small_models import jit

B, C = 2, 3


def case(T, seed=0):
    """Decays with exact zeros and ones among them, inputs, a state, short segments."""
    rng = np.random.default_rng(seed)
    decay = rng.choice([0, 1, 0.999], (B, T, C), p=[0.05, 0.2, 0.75]).astype(np.float32)
    x = rng.standard_normal((B, T, C), np.float32)
    ids = np.cumsum(rng.random((B, T)) < 0.1, axis=1).astype(np.int32)
    return decay, x, rng.standard_normal((B, C), np.float32), ids


def loop(decay, x, state, ids):
    s = []
    for t in range(x.shape[1]):
        starts = t > 0 and ids[:, t] != ids[:, t - 1]
        state = decay[:, t] * np.where(np.reshape(starts, (-1, 1)), 0, state) + x[:, t]
        s.append(state)
    return np.stack(s, axis=1)


@pytest.mark.parametrize("T", [1, 2, 8, 9, 37, 300])
def test_scan_equals_the_loop(T):
    given = case(T)
    expected = loop(*(np.float64(z) for z in given[:3]), given[3])
    assert_allclose(jit(linear_scan)(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 8, 37])
def test_gradients_are_those_of_the_loop(T):
    *given, ids = case(T)
    weights = np.random.default_rng(1).standard_normal((B, T, C))

    def step_by_step(decay, x, state):
        s = 0.0
        for t in range(T):
            starts = (ids[:, t] != ids[:, max(t - 1, 0)])[:, None]
            state = decay[:, t] * jnp.where(starts, 0, state) + x[:, t]
            s += jnp.sum(state * weights[:, t])
        return s

    at_once = lambda *z: jnp.sum(linear_scan(*z, ids) * weights)
    with jax.enable_x64(True):
        wide = [jnp.asarray(z, jnp.float64) for z in given]
        expected = jit(jax.grad(step_by_step, (0, 1, 2)))(*wide)
    for found, want in zip(jit(jax.grad(at_once, (0, 1, 2)))(*given), expected):
        assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_65536_tokens_lose_no_digits():
    """A plain sum, and a memory of some thousands of tokens."""
    T, rng = 65536, np.random.default_rng(0)
    x = rng.random((1, T, 2), np.float32)
    decay = np.stack([np.ones((1, T)), rng.uniform(0.999, 1, (1, T))], -1).astype(np.float32)
    s = np.asarray(jit(linear_scan)(decay, x), np.float64)
    expected = loop(np.float64(decay), np.float64(x), np.zeros((1, 2)), np.zeros((1, T)))
    assert_allclose(s[:, ::999], expected[:, ::999], rtol=1e-5)
