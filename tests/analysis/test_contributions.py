"""Every measure of a block against NumPy in float64, fusion by fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.analysis import lowest_places, measure_block
from gt_jax.models import FUSIONS
from tests.models.small_models import jit, lively_parameters, small_config

B, T, D = 2, 5, 32
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32; M is a difference of numbers around 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale, epsilon=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


# Fusion -> both terms of its sum, from its parameters p, its inputs r and m and the recorded gate.
TERMS = {
    "hy": lambda p, r, m, _: (
        p["rwkv_gain"] * rms_norm(r, p["rwkv_norm"]["scale"]),
        p["mamba_gain"] * rms_norm(m, p["mamba_norm"]["scale"]),
    ),
    "gf": lambda p, r, m, _: blend(
        sigmoid(np.concatenate([r, m], -1) @ p["kernel"][:, None] + p["bias"]), r, m
    ),
    "ws": lambda p, r, m, _: blend(p["alpha"], r, m),
    "rf": lambda p, r, m, _: (r, m @ p["kernel"]),
    "cp": lambda p, r, m, _: (r @ p["kernel"][:D], m @ p["kernel"][D:]),
    "hgf": lambda p, r, m, _: blend(
        sigmoid(np.concatenate([r, m], -1) @ p["kernel"] + p["bias"]), r, m
    ),
    # The gates of these are tested with the fusions.
    "gru": lambda p, r, m, gate: blend(gate, r, m),
    "mingru": lambda p, r, m, gate: blend(gate, r, m),
    "linrec": lambda p, r, m, gate: blend(gate, r, m),
    "glu": lambda p, r, m, gate: [x @ p["output_kernel"] for x in blend(gate, r, m)],
    "parallel": lambda p, r, m, gate: parallel_terms(p, r, m),
    "pscan": lambda p, r, m, gate: scanned(p, *normed(p, r, m), *blend(gate, *normed(p, r, m))),
}


def normed(p, r, m):
    return rms_norm(r, p["rwkv_norm"]["scale"], 1e-2), rms_norm(m, p["mamba_norm"]["scale"], 1e-2)


def parallel_terms(p, r, m):
    r, m = normed(p, r, m)
    gates = (sigmoid((r + m) / 2 @ p[f"{x}_kernel"] + p[f"{x}_bias"]) for x in ("rwkv", "mamba"))
    return [gate * x @ p["output_kernel"] for gate, x in zip(gates, (r, m))]


def scanned(p, r, m, *terms):
    """The memory's output for each term of what it reads."""
    n = (r + m) / 2
    decay, read = sigmoid(n @ p["decay_kernel"] + p["decay_bias"]), sigmoid(n @ p["input_kernel"])
    for x in terms:
        h, out = 0, []
        for t in range(T):
            h = decay[:, t] * h + (1 - decay[:, t]) * read[:, t] * x[:, t]
            out.append(h @ p["output_kernel"])
        yield np.stack(out, axis=1)


def blend(gate, rwkv, mamba):
    return gate * rwkv, (1 - gate) * mamba


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_terms_shares_and_cosines_are_those_of_the_formulas(fusion):
    config = small_config(fusion=fusion)
    module = FUSIONS[fusion](config)
    rng = np.random.default_rng(0)
    rwkv, mamba = rng.normal(size=(2, B, T, D)).astype(np.float32)
    params = lively_parameters(module, rwkv, mamba)
    apply = jit(lambda p: module.apply({"params": p}, rwkv, mamba, mutable="activations"))
    (fused, _), sown = apply(params)
    activations = {"rwkv_out": (rwkv,), "mamba_out": (mamba,), "fused": (fused,)}
    activations["fusion"] = sown.get("activations", {})
    found = jit(lambda p, a: measure_block(config, p, a))(params, activations)

    gate = wide(activations["fusion"].get("gate", [None])[0])
    r, m = wide(rwkv), wide(mamba)
    from_rwkv, from_mamba = TERMS[fusion](wide(params), r, m, gate)
    sizes = [np.sqrt(np.sum(x**2, axis=-1)) for x in (from_rwkv, from_mamba)]
    np.testing.assert_allclose(wide(fused), from_rwkv + from_mamba, **TOLERANCE)
    np.testing.assert_allclose(found.rwkv_norm, sizes[0], **TOLERANCE)
    np.testing.assert_allclose(found.mamba_norm, sizes[1], **TOLERANCE)
    np.testing.assert_allclose(found.share, sizes[0] / (sizes[0] + sizes[1]), **TOLERANCE)
    lengths = np.linalg.norm(r, axis=-1) * np.linalg.norm(m, axis=-1)
    np.testing.assert_allclose(found.cosine, np.sum(r * m, axis=-1) / lengths, **TOLERANCE)
    if fusion in ("rf", "cp"):
        assert found.gate is None
    else:
        expected = np.broadcast_to(np.mean(gate, axis=-1), (B, T))
        np.testing.assert_allclose(found.gate, expected, **TOLERANCE)


def test_silent_branch_has_no_direction_and_no_share():
    config = small_config(fusion="ws")
    module = FUSIONS["ws"](config)
    rwkv, mamba = jnp.ones((1, 2, D)), jnp.zeros((1, 2, D))
    params = lively_parameters(module, rwkv, mamba)
    activations = {"rwkv_out": (rwkv,), "mamba_out": (mamba,), "fused": (rwkv * params["alpha"],)}
    found = measure_block(config, params, activations)
    np.testing.assert_array_equal(found.share, 1)
    assert np.isnan(found.cosine).all()


def test_lowest_places_stay_apart_and_skip_what_is_not_a_number():
    values = np.array([5, 1, 0, 2, np.nan, 3, 9, 4], np.float32)
    assert lowest_places(values, count=3, apart=1) == [2, 1, 3]
    assert lowest_places(values, count=3, apart=3) == [2, 5]
    assert lowest_places(values, count=9, apart=2) == [2, 5, 7, 0]
    assert lowest_places(values[:0], count=3, apart=1) == []
