"""The portable kernels of WKV6: right in the interpreter, lowered for every kind of GPU.

What all Pallas kernels do alike is in test_mosaic.py, how they do on a GPU in test_wkv6_mosaic.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels import wkv6
from gt_jax.kernels.cases import WKV6_REGIMES
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from tests.kernels.accuracy import assert_accurate
from tests.kernels.hopper_kernels import WKV6, too_old

pytestmark = too_old
make = WKV6.make
# One function for all tests, so that the same shapes are compiled once.
portable, reference = WKV6.run("portable"), WKV6.run("reference")


@pytest.mark.parametrize("regime", WKV6_REGIMES)
def test_interpreted_kernel_matches_reference_in_every_decay_regime(
    float64_in_every_thread, regime
):
    with devices.simulated("interpret"):
        inputs = make(regime, length=100, heads=1)
        assert_accurate(portable, reference, inputs, WKV6.arguments, "bfloat16")


@pytest.mark.parametrize(
    "length, heads, K, V", [(1, 1, 64, 64), (64, 2, 32, 32), (65, 1, 64, 32), (130, 1, 16, 64)]
)
def test_interpreted_kernel_matches_reference_for_every_size(
    float64_in_every_thread, length, heads, K, V
):
    with devices.simulated("interpret"):
        inputs = make("minus_inf", 1, length, heads, K, V)
        assert_accurate(portable, reference, inputs, WKV6.arguments, "bfloat16")


def test_interpreted_kernel_keeps_every_bit_of_a_state_nothing_changes(float64_in_every_thread):
    r, k, v, w, u, state = make(length=65, heads=1)
    with devices.simulated("interpret"):
        _, final_state = portable(r, 0 * k, v, 0 * w, u, state)
    np.testing.assert_array_equal(final_state, state)


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_kernels_lower_for_every_kind_of_gpu(capability):
    inputs = make(length=1024, heads=2)  # in splits

    def gradients(*arrays):
        outputs, pull_back = jax.vjp(portable, *arrays)
        return outputs, pull_back(outputs)

    jax.clear_caches()
    with devices.simulated("lower"), lowered_for(capability):
        jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": jnp.float32}, "for bfloat16 r with a float32 state; these are float32, float32"),
        ({"dtype": jnp.float16}, "for bfloat16 r with a float32 state; these are float16, float32"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"K": 128}, "this call has K=128, V=64"),
    ],
)
def test_what_the_kernel_does_not_do_is_named(change, message):
    r, k, v, w, u, _ = make(length=8, K=change.get("K", 64))
    r, k, v = (z.astype(change.get("dtype", z.dtype)) for z in (r, k, v))
    options = {"precision": change.get("precision", "default"), "impl": "portable"}
    with devices.simulated("lower"), pytest.raises(ValueError, match=message):
        wkv6(r, k, v, w, u, **options)
