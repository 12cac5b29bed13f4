"""Norms before a product whose backward pass computes them again: the same bits as in two steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import gated_norm, gelu_product, head_norm
from gt_jax.kernels.elementwise.projected import projected
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models import make_config, make_model
from gt_jax.models.gelu import gelu
from tests.kernels.hopper_kernels import too_old
from tests.kernels.runs import runs_of_kernels

WIDTH, OUT = 128, 24


def with_gradients(function, arrays, cotangent):
    def run(arrays, cotangent):
        outputs, pull_back = jax.vjp(function, *arrays)
        return outputs, *pull_back(cotangent)

    return jax.jit(run)(arrays, cotangent)


def draw(*shape, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(rng.standard_normal(shape), dtype)


def parameter(*shape):
    return draw(*shape, dtype=jnp.float32)


def gated_norms():
    norm = lambda y, z, scale: gated_norm.gated_norm(1e-5, y, z, scale)
    together = lambda w, y, z, scale: gated_norm.gated_norm_projected(1e-5, y, z, scale, w)
    return norm, together, (draw(2, 16, WIDTH), draw(2, 16, WIDTH + 64), parameter(WIDTH))


def head_norms():
    norm = lambda y, g, scale, bias: head_norm.gated(y, g, scale, bias, 64e-5)
    together = lambda w, y, g, scale, bias: head_norm.gated_projected(y, g, scale, bias, 64e-5, w)
    y, g = draw(2, 16, 4, 32), draw(2, 16, WIDTH, seed=1)
    return norm, together, (y, g, parameter(WIDTH), 1 + parameter(WIDTH))


def gelus():
    together = lambda weights, x: gelu_product.gelu_product(x, weights)
    return gelu, together, (4 * draw(2, 16, WIDTH),)


NORMS = {"gated norm": gated_norms, "head norm": head_norms, "GELU": gelus}


@too_old
@pytest.mark.parametrize("name", NORMS)
def test_product_and_gradients_are_those_of_the_norm_and_a_product(name):
    with devices.simulated("interpret"):
        assert_as_in_two_steps(name)


def assert_as_in_two_steps(name, same_bits=True):
    """Without `same_bits`, to a few roundings: on a GPU products are chosen by timing."""
    norm, together, arrays = NORMS[name]()
    arrays, cotangent = (draw(WIDTH, OUT), *arrays), draw(2, 16, OUT)

    def apart(weights, *arrays):
        x = norm(*arrays)
        return (x.reshape(-1, WIDTH) @ weights).reshape(2, 16, OUT)

    expected = with_gradients(apart, arrays, cotangent)
    found = with_gradients(together, arrays, cotangent)
    if name == "gated norm":  # columns that are not of z stay unwritten
        expected, found = ((*z[:3], z[3][..., :WIDTH], *z[4:]) for z in (expected, found))
    for z, other in zip(found, expected, strict=True):
        if not same_bits:
            z, other = (np.asarray(y, np.float64) for y in (z, other))
            assert np.linalg.norm(z - other) <= 4e-3 * np.linalg.norm(other)
        elif name == "GELU":  # other arithmetic: a few numbers in a hundred round the other way
            differing = np.mean(np.asarray(z != other))
            assert differing < 0.02
            z, other = (np.asarray(y, np.float64) for y in (z, other))
            np.testing.assert_allclose(z, other, rtol=2**-7, atol=2**-7)
        else:
            np.testing.assert_array_equal(z, other)


@too_old
def test_gelu_and_its_slope_are_right_to_their_rounding_in_both_tails():
    with devices.simulated("interpret"):
        assert_gelu_is_right()


def assert_gelu_is_right():
    from gt_jax.kernels.elementwise import gelu_product_kernels

    x = jnp.linspace(-8, 8, gelu_product.BLOCK, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    below = np.array([0.5 * math.erfc(-z * 0.5**0.5) for z in wide])
    slope = below + wide * np.exp(-0.5 * wide**2) / (2 * np.pi) ** 0.5
    (value,) = gelu_product_kernels.value(x)
    again, found = gelu_product_kernels.gradients(x, jnp.ones_like(x))
    np.testing.assert_array_equal(value, again)
    np.testing.assert_allclose(np.asarray(value, np.float64), wide * below, rtol=2**-8, atol=1e-9)
    np.testing.assert_allclose(np.asarray(found, np.float64), slope, rtol=2**-8, atol=1e-6)


def test_gradients_of_any_function_before_a_product_are_right_in_float64():
    def backward(x, scale, g):
        value, pull_back = jax.vjp(lambda x, scale: jnp.tanh(x) * scale, x, scale)
        return [value, *pull_back(g)]

    with jax.enable_x64(True):
        arrays = tuple(
            jnp.asarray(draw(*shape), jnp.float64) for shape in ((5, 3), (2, 4, 5), (5,))
        )
        cotangent = jnp.asarray(draw(2, 4, 3), jnp.float64)
        product = projected(lambda x, scale: jnp.tanh(x) * scale, backward)
        straight = lambda weights, x, scale: (jnp.tanh(x) * scale) @ weights
        found = with_gradients(product, arrays, cotangent)
        for z, other in zip(found, with_gradients(straight, arrays, cotangent), strict=True):
            np.testing.assert_allclose(z, other, rtol=1e-12, atol=1e-12)


@too_old
@pytest.mark.parametrize("name", NORMS)
def test_kernels_lower_for_an_a100(name):
    _, together, arrays = NORMS[name]()
    given = (draw(WIDTH, OUT), *arrays), draw(2, 16, OUT)
    with devices.simulated("lower"), lowered_for((8, 0)):
        traced = jax.jit(lambda *z: with_gradients(together, *z)).trace(*given)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@too_old
@pytest.mark.parametrize("name", ["gated_norm_forward", "head_norm"])
def test_backward_pass_of_a_model_runs_no_norm_kernel_again(name):
    sizes = {"vocab_size": 8, "dim": 64, "heads": 1, "state_size": 64, "layers": 1}
    tokens = jnp.zeros((1, 64), jnp.int32)

    def calls(remat):
        config = make_config("gf", **sizes, dtype="bfloat16", impl="portable", remat=remat)
        model = make_model(config)

        def loss(params):
            found: Any = model.apply({"params": params}, tokens, tokens, method="loss")
            return found.nats

        with devices.simulated("lower"):
            params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
            return runs_of_kernels(jax.make_jaxpr(jax.grad(loss))(params))[name]

    assert 0 < calls("none") == calls("dots")
