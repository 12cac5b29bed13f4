"""The Mamba-2 mixer against NumPy in float64, one token at a time, and its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models.mamba2 import Mamba2, MambaState
from tests.models.small_models import jit, lively_parameters, small_config


def silu(x):
    return x / (1 + np.exp(-x))


def mixer(p, x, state, tail):
    """One row: x [T, D], state [H, 64, N], tail [3, channels] -> y [T, D], state, tail."""
    H, P, N = state.shape
    outputs = []
    for x_t in x:
        z, xBC, dt = np.split(x_t @ p["in_proj"]["kernel"], [H * P, 2 * H * P + 2 * N])
        window = np.vstack([tail, xBC])
        tail = window[1:]
        xBC = silu((window * p["conv1d"]["weight"].T).sum(0) + p["conv1d"]["bias"])
        values, B, C = np.split(xBC, [H * P, H * P + N])
        dt = np.log1p(np.exp(dt + p["dt_bias"]))
        y = np.zeros((H, P))
        for h in range(H):
            value = values[h * P : h * P + P]
            decay = np.exp(-dt[h] * np.exp(p["A_log"][h]))
            state[h] = decay * state[h] + dt[h] * np.outer(value, B)
            y[h] = state[h] @ C + p["D"][h] * value
        gated = y.reshape(-1) * silu(z)
        normed = gated / np.sqrt((gated**2).mean() + 1e-5) * p["norm"]["scale"]
        outputs.append(normed @ p["out_proj"]["kernel"])
    return np.array(outputs), state, tail


@pytest.mark.parametrize("T", [1, 19])
def test_mixer_matches_the_formulas(T):
    module = Mamba2(small_config(dim=64))
    x, ssm, conv = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, T, 64), (2, 2, 64, 16), (2, 3, 160)])
    )
    params = lively_parameters(module, x)
    y, state = jit(module.apply)({"params": params}, x, MambaState(ssm, conv))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row in range(2):
        expected, end, tail = mixer(
            p, np.float64(x[row]), np.float64(ssm[row]), np.float64(conv[row])
        )
        assert_allclose(y[row], expected, rtol=1e-4, atol=1e-4)
        assert_allclose(state.ssm[row], end, rtol=1e-4, atol=1e-4)
        assert_allclose(state.conv[row], tail, rtol=1e-4, atol=1e-5)


def test_official_initialisation():
    D, L = 512, 4  # 16 heads, enough for statistics
    module = Mamba2(small_config(dim=D, layers=L))
    p = jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    A, step = np.exp(p["A_log"]), np.log1p(np.exp(np.float64(p["dt_bias"])))
    assert ((A >= 1) & (A <= 16)).all() and A.max() > 2 * A.min()
    assert ((step > 0.999e-3) & (step < 0.1001)).all() and step.max() > 5 * step.min()
    assert (p["D"] == 1).all() and (p["norm"]["scale"] == 1).all()
    uniform = {
        0.5: (p["conv1d"]["weight"], p["conv1d"]["bias"]),
        512**-0.5: (p["in_proj"]["kernel"],),
        1024**-0.5 / 2: (p["out_proj"]["kernel"],),  # and 1 / sqrt(layers)
    }
    for bound, arrays in uniform.items():
        for array in arrays:
            assert 0.97 * bound < np.abs(array).max() <= bound
            assert_allclose(array.std(), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize("dim, size", [(64, 34_310), (128, 117_388), (192, 249_874)])
def test_mixer_has_the_official_number_of_parameters(dim, size):
    module = Mamba2(small_config(dim=dim, state_size=64))
    params = lively_parameters(module, jnp.zeros((1, 1, dim)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
