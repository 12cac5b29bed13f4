"""The Hopper kernels of WKV6: right in the interpreter, lowered without a GPU, right on a GPU.

What both kernels do alike is in test_mosaic.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels import wkv6
from gt_jax.kernels.cases import LENGTHS, WKV6_REGIMES
from gt_jax.kernels.pallas import devices
from tests.kernels import hopper_kernels
from tests.kernels.accuracy import assert_accurate
from tests.kernels.hopper_kernels import WKV6, too_old

make, run, public = WKV6.make, WKV6.run, WKV6.public
each_dtype = pytest.mark.parametrize("dtype", WKV6.dtypes["mosaic"])
each = hopper_kernels.each_dtype(WKV6)


@too_old
@each_dtype
@pytest.mark.parametrize(
    "regime, length, heads, K, V",
    [
        ("typical", 130, 3, 64, 64),
        ("minus_inf", 130, 2, 64, 64),
        ("constants", 64, 1, 64, 64),
        ("near_one", 200, 1, 64, 64),
        ("strong", 65, 2, 32, 32),
        ("slow", 5, 2, 64, 32),
    ],
)
def test_interpreted_kernel_matches_reference(
    float64_in_every_thread, regime, length, heads, K, V, dtype
):
    inputs = make(regime, 1, length, heads, K, V, dtype=dtype)
    with devices.simulated("interpret"):
        assert_accurate(run("mosaic"), run("reference"), inputs, WKV6.arguments, dtype)


@too_old
@each_dtype
def test_interpreted_kernel_keeps_every_bit_of_a_state_nothing_changes(
    float64_in_every_thread, dtype
):
    r, k, v, w, u, state = make(length=65, dtype=dtype)
    with devices.simulated("interpret"):
        _, final_state = run("mosaic")(r, 0 * k, v, 0 * w, u, state)
    np.testing.assert_array_equal(final_state, state)


@too_old
@pytest.mark.parametrize(
    "length, K, dtype, heads",  # the longer in splits; .ci/cross_compile.py compiles K = 64
    [
        (130, 32, "bfloat16", 1),
        (130, 64, "bfloat16", 4),
        (130, 32, "float32", 2),
        (2048, 32, "bfloat16", 4),
        (2048, 64, "bfloat16", 1),
        (2048, 32, "float32", 2),
    ],
)
def test_kernels_lower_for_a_gpu_that_is_not_there(length, K, dtype, heads):
    inputs = make(length=length, heads=heads, K=K, V=K, dtype=dtype)

    def gradients(*arrays):
        outputs, pull_back = jax.vjp(run("mosaic"), *arrays)
        return pull_back(outputs)

    with devices.simulated("lower"):
        jax.jit(run("mosaic")).trace(*inputs).lower(lowering_platforms=("cuda",))
        jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))


@too_old
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": jnp.float16}, "float32 r with a float32 state; these are float16, float32"),
        ({"dtype": jnp.float64}, "float32 r with a float32 state; these are float64, float64"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"K": 128}, "this call has K=128, V=64"),
    ],
)
def test_what_the_kernel_does_not_do_is_named(change, message):
    r, k, v, w, u, _ = make(length=8, K=change.get("K", 64))
    r, k, v = (z.astype(change.get("dtype", z.dtype)) for z in (r, k, v))
    options = {"precision": change.get("precision", "default"), "impl": "mosaic"}
    with devices.simulated("lower"), pytest.raises(ValueError, match=message):
        wkv6(r, k, v, w, u, **options)


def assert_kernel_matches_reference(impl, dtype, *case, **shape):
    inputs = make(*case, **shape, dtype=dtype)
    assert_accurate(public(impl), public("reference"), inputs, WKV6.arguments, dtype)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("K", (32, 64))
@pytest.mark.parametrize("regime", WKV6_REGIMES)
def test_kernel_matches_reference_in_every_decay_regime(needs_gpu, regime, K, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, regime, batch=2, length=150, heads=32, K=K, V=K)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_matches_reference_at_every_length(needs_gpu, length, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, batch=2, length=length, heads=32)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("batch, length, heads", [(1, 4096, 16), (1, 5000, 2), (2, 2048, 12)])
def test_few_heads_in_splits_match_reference(needs_gpu, batch, length, heads, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, batch=batch, length=length, heads=heads)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("heads", (1, 3, 132, 257))
def test_kernel_matches_reference_for_any_number_of_heads(needs_gpu, heads, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, heads=heads)


@pytest.mark.gpu
@each
def test_kernel_keeps_slow_channels_over_a_long_sequence(needs_gpu, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, "near_one", length=16384, heads=4)
