"""The layers that write their own gradients, against automatic ones of another formula."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models.gelu import gelu
from gt_jax.models.layers import RMSNorm, segment_index
from gt_jax.models.mamba2_layers import CausalConv, GatedNorm

B, T, D, WIDTH = 2, 11, 8, 4


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def same_with_gradients(f, g, *arguments):
    """f and g agree in value and in the gradient of every argument, to float32 rounding."""
    weight, every = draw(99, B, T, D), range(len(arguments))
    rounding = {"rtol": 1e-5, "atol": 1e-5}
    assert_allclose(f(*arguments), g(*arguments), **rounding)
    found, expected = (
        jax.grad(lambda *z, h=h: jnp.sum(h(*z) * weight), every)(*arguments) for h in (f, g)
    )
    for a, b in zip(found, expected):
        assert_allclose(a, b, **rounding)


def test_rms_norm_matches_flax():
    ours, theirs = RMSNorm(1e-3), nn.RMSNorm(epsilon=1e-3)
    same_with_gradients(
        lambda x, scale: ours.apply({"params": {"scale": scale}}, x),
        lambda x, scale: theirs.apply({"params": {"scale": scale}}, x),
        draw(0, B, T, D),
        draw(1, D),
    )


def test_gelu_in_bfloat16_is_right_to_its_rounding_in_both_tails():
    x = jnp.linspace(-8, 8, 4001, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    below = np.array([0.5 * math.erfc(-z * 0.5**0.5) for z in wide])
    slope = below + wide * np.exp(-0.5 * wide**2) / (2 * np.pi) ** 0.5
    y, pull_back = jax.vjp(gelu, x)
    (found,) = pull_back(jnp.ones_like(x))
    assert_allclose(np.asarray(y, np.float64), wide * below, rtol=2**-8, atol=1e-9)
    assert_allclose(np.asarray(found, np.float64), slope, rtol=2**-8, atol=1e-6)


@pytest.mark.optimized
def test_gelu_keeps_its_bfloat16_input_for_the_backward_pass_and_nothing_in_float32():
    tokens, width = 4096, 256

    def temporaries(layers):
        def loss(kernels, x):
            for kernel in kernels:
                x = gelu(x @ kernel)
            return jnp.sum(x.astype(jnp.float32))

        of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        lowered = jax.jit(jax.grad(loss)).lower([of(width, width)] * layers, of(tokens, width))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # XLA for CPUs keeps 8.25 bytes a number of each layer, or 6, as it multiplies in float32; with
    # what GELU computes it was 16.25, or 10.
    assert temporaries(10) - temporaries(4) <= 6 * 9 * tokens * width


def test_gated_norm_matches_flax_on_the_gated_values():
    ours, theirs = GatedNorm(1e-3), nn.RMSNorm(epsilon=1e-3)
    same_with_gradients(
        lambda y, z, scale: ours.apply({"params": {"scale": scale}}, y, z),
        lambda y, z, scale: theirs.apply({"params": {"scale": scale}}, y * z / (1 + jnp.exp(-z))),
        draw(0, B, T, D),
        draw(1, B, T, D),
        draw(2, D),
    )


@pytest.mark.parametrize("ids", [None, [[4] * 2 + [9] * 5 + [4] * 4, [0] * 10 + [1]]])
def test_convolution_matches_a_matrix_over_time(ids):
    """silu(sum over s of weight[t - s] x_s), s in the document of t, the tail in the first."""
    segment = np.array(ids) if ids else np.zeros((B, T), int)
    segment = np.cumsum(np.diff(segment, prepend=segment[:, :1]) != 0, axis=1)
    segment = np.pad(segment, ((0, 0), (WIDTH - 1, 0)))  # [B, WIDTH - 1 + T], the tail first
    lag = np.arange(T)[:, None] + WIDTH - 1 - np.arange(WIDTH - 1 + T)  # [t, s]
    sees = (lag >= 0) & (lag < WIDTH) & (segment[:, WIDTH - 1 :, None] == segment[:, None])

    def expected(x, tail, weight, bias):
        taps = weight[:, np.clip(WIDTH - 1 - lag, 0, WIDTH - 1)]  # [D, t, s]
        window = jnp.concatenate([tail, x], axis=1)
        y = jnp.einsum("dts,bts,bsd->btd", taps, sees.astype(np.float32), window) + bias
        return y / (1 + jnp.exp(-y))

    def found(x, tail, weight, bias):
        params = {"weight": weight, "bias": bias}
        return CausalConv(WIDTH).apply({"params": params}, x, tail, ids and jnp.array(ids))[0]

    same_with_gradients(
        found, expected, draw(0, B, T, D), draw(1, B, WIDTH - 1, D), draw(2, D, WIDTH), draw(3, D)
    )


def test_rows_of_one_segment_leave_no_sum_to_the_compiler():
    one = jnp.full((B, T), 7)
    assert_allclose(segment_index(None, (B, T)), segment_index(one, (B, T)))
    assert segment_index(None, (B, T)).dtype == segment_index(one, (B, T)).dtype
    assert "cumsum" in str(jax.make_jaxpr(lambda ids: segment_index(ids, (B, T)))(one))
    assert "cumsum" not in str(jax.make_jaxpr(lambda: segment_index(None, (B, T)))())
