"""The sums of log decays that the fused kernels of SSD read, and what becomes of their rates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.cases import segments
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.ssd.hopper_sizes import Sizes
from tests.kernels.accuracy import assert_accurate
from tests.kernels.hopper_kernels import SSD, too_old

pytestmark = too_old


def sums_of(size, dt, a):
    from gt_jax.kernels.ssd.decay_sums import decay_sums

    with devices.simulated("interpret"):
        return decay_sums(size, jnp.asarray(dt, jnp.float32), jnp.asarray(a, jnp.float32))


@pytest.mark.parametrize("heads, length, terms", [(4, 130, 1), (5, 64, 2)])
def test_sums_of_log_decays_and_steps_stand_by_head_and_chunk(
    float64_in_every_thread, heads, length, terms
):
    rng = np.random.default_rng(0)
    size = Sizes(2, length, heads, 1, 64, 64, terms)
    dt, rates = rng.exponential(size=(2, length, heads)), -rng.exponential(2.0, size=heads)
    dt[1, 3, 0], rates = 1e4, np.float32(rates)  # a decay of 0
    dt = np.float32(dt)
    beyond = ((0, 0), (0, size.chunks * 64 - length), (0, 0))
    by_chunk = lambda z: np.pad(z, beyond).swapaxes(1, 2).reshape(2, heads, size.chunks, 64)
    log_decay = np.float64(dt * rates)
    expected = np.cumsum(by_chunk(np.maximum(log_decay, -104) / np.log(2)), axis=-1)
    g, steps = sums_of(size, dt, rates)
    assert g.shape == (2, heads, size.chunks, terms, 64)
    np.testing.assert_allclose(np.sum(g, axis=3, dtype=np.float64), expected, rtol=2e-6)
    np.testing.assert_array_equal(steps, by_chunk(dt))
    np.testing.assert_array_equal(sums_of(size, dt, dt * rates)[0], g)  # of rates or of tokens
    if terms == 2:
        np.testing.assert_array_equal(g[..., 0, :], np.round(g[..., 0, :]))


@pytest.mark.parametrize("impl, dtype", [("mosaic", "float32"), ("portable", "bfloat16")])
def test_the_gradient_of_rates_forgets_what_a_segment_forgets(float64_in_every_thread, impl, dtype):
    inputs = SSD.make("wide", batch=2, length=100, dtype=dtype)
    ids = jnp.asarray(segments(2, 100))
    call = lambda name: functools.partial(_of_segments, ids, name)
    with devices.simulated("interpret"):
        assert_accurate(call(impl), call("reference"), inputs, SSD.arguments, dtype)


def _of_segments(ids, impl, *inputs):
    given = dict(zip(SSD.arguments, inputs))
    return SSD.operation(**given, segment_ids=ids, impl=impl)


@pytest.mark.parametrize("impl", ["mosaic", "portable"])
def test_rates_need_no_array_of_log_decays_outside_of_kernels(impl):
    inputs = SSD.make(length=128)
    with devices.simulated("lower"):
        text = jax.jit(SSD.call(impl)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" not in text and "stablehlo.multiply" not in text
