"""Mamba-2's fused convolution and norm: right in the interpreter, lowered for every kind of GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import causal_conv, gated_norm
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models.config import ModelConfig
from gt_jax.models.mamba2 import Mamba2
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old

SIZES = causal_conv.Sizes(inner=128, state=64, heads=6)
TOKENS = (2, 16)
DOCUMENTS = np.array([[0] * 5 + [1] * 2 + [2] * 9, [0] + [1] * 15])
NAMES = ["values", "B", "C", "dt", "out", "d_projected", "d_weight", "d_bias", "dy", "d_scale"]


def fused(projected, weight, bias, y, scale, seen=None):
    projected, *parts = causal_conv.split_and_convolve(SIZES, projected, weight, bias, seen)
    return (*parts, gated_norm.gated_norm(1e-5, y, projected, scale))


def straight(projected, weight, bias, y, scale, documents):
    """The same in float64, by formulas that share nothing with the kernels."""
    E, C = SIZES.inner, SIZES.channels
    z, x = projected[..., :E], projected[..., E : E + C]
    sums = bias
    for before in range(4):
        earlier = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))[:, : x.shape[1]]
        of = np.pad(documents, ((0, 0), (before, 0)), constant_values=-1)[:, : x.shape[1]]
        earlier = jnp.where((of == documents)[..., None], earlier, 0)
        sums = sums + earlier * weight[:, 3 - before]
    parts = jnp.split(jax.nn.silu(sums), [E, E + SIZES.state], axis=-1)
    gated = y * jax.nn.silu(z)
    norm = gated / jnp.sqrt(jnp.mean(gated**2, axis=-1, keepdims=True) + 1e-5) * scale
    return (*parts, projected[..., E + C : E + C + SIZES.heads], norm)


def with_gradients(function, inputs, cotangents):
    def run(inputs, cotangents):
        outputs, pull_back = jax.vjp(function, *inputs)
        return (*outputs, *pull_back(cotangents))

    return jax.jit(run)(inputs, cotangents)


@pytest.fixture(scope="module")
def case():
    return make_case(*TOKENS)


def make_case(rows, length):
    """(inputs, cotangents) of that many tokens."""
    rng = np.random.default_rng(0)
    wide = [SIZES.padded_width, SIZES.inner, SIZES.state, SIZES.state, SIZES.heads, SIZES.inner]
    p, y, *rest = (jnp.asarray(rng.normal(size=(rows, length, w)), jnp.bfloat16) for w in wide)
    cotangents = (y[::-1], *rest)
    weight = rng.normal(size=(SIZES.channels, 4))
    parameters = weight, rng.normal(size=SIZES.channels), 1 + rng.normal(size=SIZES.inner) / 4
    weight, bias, scale = (jnp.asarray(z, jnp.float32) for z in parameters)
    return (p, weight, bias, y, scale), cotangents


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
def test_interpreted_kernels_match_straight_formulas_in_float64(
    float64_in_every_thread, case, documents
):
    with devices.simulated("interpret"):
        assert_matches(*case, documents)


def assert_matches(inputs, cotangents, documents):
    """Kernels beside float64."""
    seen = None if documents is None else causal_conv.tokens_seen(jnp.asarray(documents, jnp.int32))
    ours = with_gradients(lambda *z: fused(*z, seen), inputs, cotangents)
    of = np.zeros(inputs[0].shape[:2], int) if documents is None else documents
    wide = jax.tree.map(lambda z: z.astype(jnp.float64), (inputs, cotangents))
    true = with_gradients(lambda *z: straight(*z, of), *wide)
    for name, z, expected in zip(NAMES, ours, true, strict=True):
        error = np.sqrt(np.mean((np.asarray(z, np.float64) - expected) ** 2))
        bound = 3e-3 if z.dtype == jnp.bfloat16 else 1e-6  # of rounding to 8 or 24 bits
        assert error <= bound * np.sqrt(np.mean(np.square(expected))), name


def test_models_under_vmap_each_take_their_own_weights(case):
    inputs, _ = case
    two = jax.tree.map(lambda z: jnp.stack([z, z[..., ::-1]]), inputs)
    with devices.simulated("interpret"):
        together = jax.jit(jax.vmap(fused))(*two)
        alone = [jax.jit(fused)(*(z[n] for z in two)) for n in range(2)]
    for z, expected in zip(together, zip(*alone), strict=True):
        np.testing.assert_array_equal(z, jnp.stack(expected))


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=str)
def test_a_mixer_with_remat_lowers_to_one_kernel_a_direction(capability):
    config = ModelConfig(
        vocab_size=64,
        architecture="mamba2",
        dim=64,
        state_size=64,
        dtype="bfloat16",
        impl="portable",
    )
    mixer, x = Mamba2(config), jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16)

    @jax.checkpoint
    def loss(params, x):
        return jnp.sum(mixer.apply(params, x)[0].astype(jnp.float32))

    jax.clear_caches()
    with devices.simulated("lower"), lowered_for(capability):
        params = jax.eval_shape(mixer.init, jax.random.key(0), x)
        traced = jax.jit(jax.grad(loss)).trace(params, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("causal_conv_forward", "causal_conv_backward", "gated_norm_backward"):
        assert f"{name}_mosaic_gpu" in text, name


@pytest.mark.parametrize(
    "sizes, tokens, dtype, reason",
    [
        (SIZES, (2, 16), "float32", "is for bfloat16; this is float32"),
        (causal_conv.Sizes(100, 64, 6), (4, 64), "bfloat16", "Sizes(inner=100"),
        (SIZES, (2, 7), "bfloat16", "2 x 7"),
    ],
)
def test_what_the_convolution_does_not_take_is_named(sizes, tokens, dtype, reason):
    with devices.simulated("lower"):
        assert reason in causal_conv.unsupported(sizes, tokens, dtype)
        assert "7 tokens of 100 channels" in gated_norm.unsupported(100, 7, "bfloat16")
