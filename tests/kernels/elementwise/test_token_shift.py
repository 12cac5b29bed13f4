"""Kernels of token shifts and of the gated head norm: the interpreter against float64, every GPU.

What the plain form of a model computes is the oracle, in float64, by automatic differentiation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import (
    head_norm,
    token_shift,
    token_shift_copies,
    token_shift_kernels,
)
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old
BLENDS, RANK = 2, 32


def make_blends(batch, length, dim, documents=False, last=False):
    """x, last, resets, mu, hidden and w of token_shift.blends."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
    x = normal(batch, length, dim)
    mu = jax.random.uniform(next(keys), (BLENDS, dim), jnp.float32)
    hidden = jnp.tanh(normal(batch, length, BLENDS * RANK))
    w = 0.2 * normal(BLENDS, RANK, dim).astype(jnp.float32)
    resets = (
        jnp.zeros((batch, length), bool)
        .at[:, [1, length // 2 - 1, length // 2, length - 1]]
        .set(True)
    )
    before = normal(batch, dim) if last else None
    return x, before, resets if documents else None, mu, hidden, w


def plain_blends(x, last, resets, mu, hidden, w):
    last = jnp.zeros_like(x[:, 0]) if last is None else last
    before = jnp.concatenate([last[:, None], x[:, :-1]], axis=1)
    if resets is not None:
        before = jnp.where(resets[..., None], 0, before)
    each = jnp.moveaxis(hidden.reshape(*x.shape[:2], len(mu), -1), 2, 0)
    shares = mu[:, None, None] + jnp.einsum("jbtr,jrd->jbtd", each, w)
    return list(x + (before - x) * shares)


def values_and_gradients(function, inputs, cotangents):
    """Outputs and gradients by every input that is a float array."""
    used = [z for z in inputs if z is not None and z.dtype != bool]

    def of_used(*used):
        left = list(used)
        return function(*(z if z is None or z.dtype == bool else left.pop(0) for z in inputs))

    outputs, pull_back = jax.vjp(of_used, *used)
    return *jax.tree.leaves(outputs), *pull_back(cotangents)


def as_float64(tree):
    cast = lambda z: z if z.dtype == bool else z.astype(jnp.float64)
    return jax.tree.map(cast, tree)


def assert_close(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        a, b = (np.asarray(z.astype(jnp.float64)) for z in (a, b))
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)


def interpreted_and_exact_blends(shape, options):
    """Values and gradients by the kernels, and by the plain form in float64."""
    inputs = make_blends(*shape, **options)
    keys = jax.random.split(jax.random.key(1), BLENDS)
    cotangents = [jax.random.normal(k, inputs[0].shape, jnp.bfloat16) for k in keys]
    with devices.simulated("interpret"):
        assert token_shift.fits("auto", inputs[0], RANK)
        ours = values_and_gradients(token_shift.blends, inputs, cotangents)
    exact = values_and_gradients(plain_blends, as_float64(inputs), as_float64(cotangents))
    assert [z.dtype for z in ours] == [z.dtype for z in (*cotangents, *filter(_is_float, inputs))]
    return ours, exact


@pytest.mark.parametrize(
    "shape, options",
    [
        ((1, 128, 128), {"documents": True, "last": True}),
        ((2, 32, 64), {}),
    ],
)
def test_interpreted_blends_match_the_plain_form_in_float64(
    float64_in_every_thread, shape, options
):
    assert_close(*interpreted_and_exact_blends(shape, options))


@pytest.mark.parametrize("room", [98, 0], ids=["next tile on its way", "room for one tile"])
def test_blends_match_the_plain_form_however_the_work_is_cut(
    float64_in_every_thread, monkeypatch, room
):
    # A block of the grid walks all channels of its tokens, or one or two tiles of four.
    cut = token_shift_kernels.Tuning(forward_blocks=1, sums_blocks=6, sums_tiles=1)
    monkeypatch.setattr(token_shift_kernels, "TUNING", cut)
    monkeypatch.setattr(token_shift_copies, "_ROOM", room)
    jax.clear_caches()
    assert_close(*interpreted_and_exact_blends((1, 128, 128), {"documents": True}))
    jax.clear_caches()


def _is_float(z):
    return z is not None and z.dtype != bool


def make_norm(batch, length, heads, channels):
    """y, g, scale and bias of head_norm.gated."""
    keys = jax.random.split(jax.random.key(0), 4)
    y = (3 * jax.random.normal(keys[0], (batch, length, heads, channels)) + 1).astype(jnp.bfloat16)
    g = (4 * jax.random.normal(keys[1], (batch, length, heads * channels))).astype(jnp.bfloat16)
    scale, bias = (jax.random.normal(k, (heads * channels,), jnp.float32) for k in keys[2:])
    return y, g, scale, bias


def fused_norm(y, g, scale, bias):
    return head_norm.gated(y, g, scale, bias, 64e-5)


def plain_norm(y, g, scale, bias):
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 64e-5)
    return (y.reshape(g.shape) * scale + bias) * jax.nn.silu(g)


@pytest.mark.parametrize("shape", [(2, 48, 2, 64)])
def test_interpreted_head_norm_matches_the_plain_form_in_float64(float64_in_every_thread, shape):
    inputs = make_norm(*shape)
    cotangent = jax.random.normal(jax.random.key(1), inputs[1].shape, jnp.bfloat16)
    with devices.simulated("interpret"):
        assert head_norm.fits("auto", *inputs[:2])
        ours = values_and_gradients(fused_norm, inputs, cotangent)
    exact = values_and_gradients(plain_norm, as_float64(inputs), as_float64(cotangent))
    assert_close(ours, exact)


def test_several_models_at_once_are_what_each_gives(float64_in_every_thread):
    def gradients(x, mu, hidden, w):
        blends = lambda *z: sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in blended(*z))
        blended = lambda x, mu, hidden, w: token_shift.blends(x, None, None, mu, hidden, w)
        return jax.grad(blends, range(4))(x, mu, hidden, w)

    x, _, _, mu, hidden, w = make_blends(1, 64, 64)
    models = [jnp.stack([z, z[..., ::-1]]) for z in (x, mu, hidden, w)]
    with devices.simulated("interpret"):
        together = jax.vmap(gradients)(*models)
        alone = gradients(*(z[1] for z in models))
    for several, one in zip(together, alone):
        np.testing.assert_array_equal(several[1], one)


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=str)
def test_kernels_lower_for_every_kind_of_gpu(capability):
    for function, inputs in (
        (token_shift.blends, make_blends(1, 64, 64)),
        (fused_norm, make_norm(1, 32, 1, 64)),
    ):

        def both(inputs, function=function):
            outputs = jax.eval_shape(function, *inputs)
            ones = jax.tree.map(lambda z: jnp.ones(z.shape, z.dtype), outputs)
            return values_and_gradients(function, inputs, ones)

        jax.clear_caches()
        with devices.simulated("lower"), lowered_for(capability):
            jax.jit(both).trace(inputs).lower(lowering_platforms=("cuda",))


def test_calls_that_no_kernel_takes_are_left_to_the_plain_form():
    x = jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16)
    changed = lambda **z: jax.ShapeDtypeStruct(**{"shape": x.shape, "dtype": x.dtype} | z)
    fits = lambda impl, x, rank=32: token_shift.fits(impl, x, rank)
    assert not fits("auto", x)  # no GPU
    with devices.simulated("lower"):
        assert fits("auto", x) and fits("portable", x)
        assert not fits("chunked", x)
        assert not fits("auto", x, 24)
        assert not fits("auto", changed(dtype=jnp.float32))
        assert not fits("auto", changed(shape=(2, 33, 64)))
        assert not fits("auto", changed(shape=(64, 1, 64)))  # a step of decoding
        assert not fits("auto", changed(shape=(2, 64, 96)))
