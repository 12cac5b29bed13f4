"""The RWKV-6 modules against NumPy in float64, one token at a time, and their initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models import layers, rwkv6
from gt_jax.models.rwkv6 import ChannelMix, TimeMix, TimeMixState
from tests.models.small_models import (
    jit,
    lively_parameters,
    random_tokens,
    small_config,
    small_model,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def to_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def time_mix(p, x, H, state, last):
    """One row: x [T, D], state [H, K, K], last [D] -> y [T, D], state, last."""
    K = x.shape[1] // H
    outputs = []
    for x_t in x:
        shift = last - x_t
        hidden = np.tanh((x_t + shift * p["time_maa_x"]) @ p["time_maa_w1"])
        inputs = {}
        for j, name in enumerate("wkvrg"):
            share = p[f"time_maa_{name}"] + hidden[32 * j : 32 * j + 32] @ p["time_maa_w2"][j]
            inputs[name] = x_t + shift * share
        names = {"r": "receptance", "k": "key", "v": "value", "g": "gate"}
        r, k, v, g = (inputs[j] @ p[name]["kernel"] for j, name in names.items())
        omega = p["time_decay"] + np.tanh(inputs["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
        w = np.exp(-np.exp(omega))

        y = np.zeros((H, K))
        for h in range(H):
            at = slice(h * K, h * K + K)
            present = np.outer(k[at], v[at])
            y[h] = r[at] @ (state[h] + p["time_faaaa"][h][:, None] * present)
            state[h] = w[at][:, None] * state[h] + present
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 64e-5)
        y = y.reshape(-1) * p["ln_x"]["scale"] + p["ln_x"]["bias"]
        outputs.append((y * g * sigmoid(g)) @ p["output"]["kernel"])
        last = x_t
    return np.array(outputs), state, last


def channel_mix(p, x, last):
    """One row: x [T, D], last [D] -> y [T, D], last."""
    before = np.vstack([last, x[:-1]])
    x_k = x + (before - x) * p["time_maa_k"]
    x_r = x + (before - x) * p["time_maa_r"]
    value = np.maximum(x_k @ p["key"]["kernel"], 0) ** 2 @ p["value"]["kernel"]
    return sigmoid(x_r @ p["receptance"]["kernel"]) * value, x[-1]


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize(("T", "quick"), [(1, True), (19, False), (19, True)])
def test_time_mix_matches_the_formulas(monkeypatch, T, quick):
    for module in (layers, rwkv6):
        monkeypatch.setattr(module, "is_launch_bound", lambda x: quick)
    config = small_config(heads=4)
    x, wkv, last = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, T, 32), (2, 4, 8, 8), (2, 32)])
    )
    module = TimeMix(config, layer=1)
    params = lively_parameters(module, x)
    y, state = jit(module.apply)({"params": params}, x, TimeMixState(wkv, last))
    for row in range(2):
        expected, end, _ = time_mix(
            to_float64(params), np.float64(x[row]), 4, np.float64(wkv[row]), np.float64(last[row])
        )
        assert_allclose(y[row], expected, rtol=1e-4, atol=1e-4)
        assert_allclose(state.wkv[row], end, rtol=1e-4, atol=1e-4)
    assert_allclose(state.last, x[:, -1])


def test_channel_mix_matches_the_formulas():
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    last = jax.random.normal(jax.random.key(1), (2, 32))
    module = ChannelMix(small_config(), layer=1)
    params = lively_parameters(module, x)
    assert params["key"]["kernel"].shape == (32, 96)  # 3.5 x 32 = 112, down to a multiple of 32
    y, end = jit(module.apply)({"params": params}, x, last)
    for row in range(2):
        expected, _ = channel_mix(to_float64(params), np.float64(x[row]), np.float64(last[row]))
        assert_allclose(y[row], expected, rtol=1e-4, atol=1e-5)
    assert_allclose(end, x[:, -1])


def test_language_model_matches_the_formulas():
    small = small_model("rwkv6")
    tokens = random_tokens(2, 21)
    p = to_float64(small.params)
    logits = small.apply({"params": small.params}, tokens).logits
    for row in range(2):
        x = layer_norm(p["blocks_0"]["embedding_norm"], p["embedding"]["embedding"][tokens[row]])
        for block in (p["blocks_0"], p["blocks_1"]):
            n = layer_norm(block["mixer_norm"], x)
            x = x + time_mix(block["rwkv"], n, 2, np.zeros((2, 16, 16)), np.zeros(32))[0]
            x = x + channel_mix(block["ffn"], layer_norm(block["ffn_norm"], x), np.zeros(32))[0]
        expected = layer_norm(p["final_norm"], x) @ p["head"]
        assert_allclose(logits[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_official_initialisation(layer):
    D, L, H = 64, 4, 4
    config = small_config(dim=D, layers=L, heads=H)
    x = jnp.zeros((1, 2, D))
    p = jit(TimeMix(config, layer).init)(jax.random.key(0), x)["params"]
    c = jit(ChannelMix(config, layer).init)(jax.random.key(0), x)["params"]
    rho, kappa = layer / 3, 1 - layer / 4
    i = np.arange(D)
    for name in "xwk":
        assert_allclose(p[f"time_maa_{name}"], 1 - (i / D) ** kappa, atol=1e-6)
    assert_allclose(p["time_maa_v"], 1 - ((i / D) ** kappa + 0.3 * rho), atol=1e-6)
    for name in "rg":
        assert_allclose(p[f"time_maa_{name}"], 1 - (i / D) ** (0.5 * kappa), atol=1e-6)
    for name in "kr":
        assert_allclose(c[f"time_maa_{name}"], 1 - (i / D) ** kappa**3, atol=1e-6)
    assert_allclose(p["time_decay"], -6 + 5 * (i / 63) ** (0.7 + 1.3 * rho), atol=1e-5)
    bonus = [rho * (1 - n / 63) + 0.1 * ((n + 1) % 3 - 1) for n in range(D)]
    assert_allclose(p["time_faaaa"].reshape(-1), bonus, atol=1e-6)
    assert_allclose(p["ln_x"]["scale"], ((1 + layer) / L) ** 0.7, rtol=1e-6)
    for name in ("time_maa_w1", "time_decay_w1"):
        assert not p[name].any()
    for name in ("time_maa_w2", "time_decay_w2"):
        assert 0.009 < np.abs(p[name]).max() <= 0.01
        assert_allclose(p[name].std(), 0.01 / 3**0.5, rtol=0.05)
    for kernel in (p["output"], c["value"], c["receptance"]):
        assert not kernel["kernel"].any()
    gains = {"receptance": 1, "value": 1, "key": 0.1, "gate": 0.1}
    for name, gain in gains.items():
        kernel = p[name]["kernel"]
        assert_allclose(kernel @ kernel.T, gain**2 * np.eye(D), atol=1e-5)
    assert_allclose(c["key"]["kernel"] @ c["key"]["kernel"].T, np.eye(D), atol=1e-5)


def test_language_model_initialisation():
    model = small_model("rwkv6", vocab_size=128).model
    p = jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert_allclose(p["head"] @ p["head"].T, 0.25 * 128 / 32 * np.eye(32), atol=1e-5)
    assert 0.9e-4 < np.abs(p["embedding"]["embedding"]).max() <= 1e-4


def test_time_mix_has_the_official_number_of_parameters():
    params = lively_parameters(TimeMix(small_config(dim=128, heads=4), 0), jnp.zeros((1, 1, 128)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5 * 128**2 + 458 * 128
