"""The four legacy recurrences against NumPy in float64, one token at a time."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models.legacy import LegacyBranch
from tests.models.small_models import jit, lively_parameters, small_config

H, K = 2, 16


def recurrence(variant, p, k, v, r):
    """[T, D] from keys, values and receptances [T, D] of one document."""
    w, u = np.exp(-np.exp(p["time_decay"])).reshape(-1), p["time_first"].reshape(-1)
    matrix, top, below, outputs = np.zeros((H, K, K)), 0, 0, []
    for t in range(len(k)):
        if variant == "a":
            k_t, v_t, r_t, w_t, u_t = (z.reshape(H, K) for z in (k[t], v[t], r[t], w, u))
            present = k_t[:, :, None] * v_t[:, None, :]
            read = matrix + u_t[:, :, None] * present
            outputs.append(np.einsum("hk,hkv->hv", r_t, read).reshape(-1))
            matrix = w_t[:, :, None] * matrix + present
        elif variant == "b1":
            top = w * top + np.exp(k[t]) * v[t]
            outputs.append((np.exp(k[t]) + np.exp(u)) * v[t] if t == 0 else top)
        else:
            low, high = (-10, 10) if variant == "c" else (-np.inf, 30)
            weight = np.exp(np.clip(k[t], low, high))
            top, below = w * top + weight * v[t], w * below + weight
            scale = np.exp(u) if t == 0 else 1
            outputs.append(scale * top / (scale * below + 1e-6))
    return np.array(outputs)


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize("variant", ["a", "b1", "b2", "c"])
def test_branch_matches_the_formulas(variant):
    x = jax.random.normal(jax.random.key(0), (2, 13, 32))
    module = LegacyBranch(small_config(legacy_wkv=variant))
    params = lively_parameters(module, x)
    y, _ = jit(module.apply)({"params": params}, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row in range(2):
        n = np.float64(x[row])
        inner = n if variant == "c" else layer_norm(p["mixer_norm"], n)
        k, v, r = (inner @ p[name]["kernel"] for name in ("key", "value", "receptance"))
        wkv = recurrence(variant, p, k, v, r)
        expected = (wkv / (1 + np.exp(-r))) @ p["output"]["kernel"]
        if variant != "c":
            expected = expected + n
            hidden = np.maximum(layer_norm(p["ffn_norm"], expected) @ p["ffn_key"]["kernel"], 0)
            expected = expected + hidden**2 @ p["ffn_value"]["kernel"]
        assert_allclose(y[row], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", ["a", "b1", "b2", "c"])
def test_initialisation(variant):
    config = small_config(legacy_wkv=variant)
    x = jax.random.normal(jax.random.key(0), (1, 2, 32))
    p = jit(LegacyBranch(config).init)(jax.random.key(0), x)["params"]
    assert (p["time_decay"] == -5).all() and not p["time_first"].any()
    kernels = [part["kernel"] for part in p.values() if isinstance(part, dict) and "kernel" in part]
    assert len(kernels) == (4 if variant == "c" else 6)
    for kernel in kernels:
        if variant == "c":
            assert 0.9 < np.abs(kernel).max() / (0.5 * (6 / 64) ** 0.5) <= 1  # Xavier, gain 0.5
        else:
            wide = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
            assert_allclose(wide @ wide.T, np.eye(32), atol=1e-5)
