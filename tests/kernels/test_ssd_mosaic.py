"""The Hopper kernels of SSD: right in the interpreter, lowered without a GPU, right on a GPU.

What both kernels do alike is in test_mosaic.py.
"""

import jax
import jax.numpy as jnp
import pytest

from gt_jax.kernels import ssd
from gt_jax.kernels.cases import SSD_REGIMES
from gt_jax.kernels.pallas import devices
from tests.kernels import hopper_kernels
from tests.kernels.accuracy import TOLERANCE, assert_accurate, errors
from tests.kernels.hopper_kernels import SSD, too_old

make, run, public = SSD.make, SSD.run, SSD.public
each_dtype = pytest.mark.parametrize("dtype", SSD.dtypes["mosaic"])
each = hopper_kernels.each_dtype(SSD)


@too_old
@pytest.mark.parametrize(
    "regime, length, heads, groups, N, dtype",
    [
        ("typical", 130, 2, 1, 64, "bfloat16"),
        ("some_huge_steps", 130, 2, 1, 64, "bfloat16"),
        ("zero_rows", 64, 2, 1, 128, "bfloat16"),
        ("wide", 64, 3, 3, 64, "bfloat16"),
        ("typical", 130, 3, 1, 64, "float32"),
        ("some_huge_steps", 130, 2, 1, 128, "float32"),
        ("near_one", 200, 1, 1, 64, "float32"),
        ("wide", 65, 4, 2, 64, "float32"),
    ],
)
def test_interpreted_kernel_matches_reference(
    float64_in_every_thread, regime, length, heads, groups, N, dtype
):
    inputs = SSD.per_token(make(regime, 1, length, heads, groups, N, dtype=dtype))
    with devices.simulated("interpret"):
        assert_accurate(run("mosaic"), run("reference"), inputs, SSD.arguments, dtype)


@too_old
def test_interpreted_gradient_of_A_is_good_where_it_cancels(float64_in_every_thread):
    inputs = make("wide", length=150, heads=8, N=64, seed=2, dtype="float32")
    with devices.simulated("interpret"):
        found = errors(SSD.call("mosaic"), SSD.call("reference"), inputs, SSD.arguments)
    assert found["d_A"] <= TOLERANCE["float32"]  # 2.7e-5 with operands of two terms throughout


@too_old
def test_interpreted_states_keep_float32_over_many_chunks(float64_in_every_thread):
    *inputs, state = SSD.per_token(make("near_one", length=1280))
    inputs = (*inputs, jnp.zeros_like(state))  # all that is in the state came slowly
    with devices.simulated("interpret"):
        found = errors(run("mosaic"), run("reference"), inputs, SSD.arguments)
    assert found["final_state"] < TOLERANCE["float32"]  # nor is what comes in rounded
    assert found["d_initial_state"] < TOLERANCE["bfloat16"]


@too_old
@pytest.mark.parametrize(
    "length, N, heads, groups, dtype",  # the longest in splits; cross_compile.py compiles N = 128
    [
        (64, 64, 4, 2, "bfloat16"),
        (64, 128, 3, 1, "bfloat16"),
        (64, 64, 4, 2, "float32"),
        (130, 64, 3, 1, "bfloat16"),
        (130, 128, 4, 2, "bfloat16"),
        (130, 128, 4, 2, "float32"),
        (2048, 64, 4, 2, "bfloat16"),
        (2048, 128, 3, 1, "bfloat16"),
        (2048, 64, 4, 2, "float32"),
    ],
)
def test_kernels_lower_for_a_gpu_that_is_not_there(length, N, heads, groups, dtype):
    inputs = make(batch=2, length=length, heads=heads, groups=groups, N=N, dtype=dtype)
    inputs = SSD.per_token(inputs)

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
        ({"dtype": jnp.float16}, "float32 x with a float32 state; these are float16, float32"),
        ({"dtype": jnp.float64}, "float32 x with a float32 state; these are float64, float64"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"N": 32}, "this call has P=64, N=32"),
    ],
)
def test_what_the_kernel_does_not_do_is_named(change, message):
    x, dt, A, B, C, *_ = make(length=8, N=change.get("N", 64))
    x, B, C = (z.astype(change.get("dtype", z.dtype)) for z in (x, B, C))
    options = {"precision": change.get("precision", "default"), "impl": "mosaic"}
    with devices.simulated("lower"), pytest.raises(ValueError, match=message):
        ssd(x, dt, A, B, C, **options)


def assert_kernel_matches_reference(impl, dtype, *case, **shape):
    inputs = make(*case, **shape, dtype=dtype)
    assert_accurate(public(impl), public("reference"), inputs, SSD.arguments, dtype)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("regime", SSD_REGIMES)
def test_kernel_matches_reference_in_every_decay_regime(needs_gpu, regime, N, impl, dtype):
    shape = {"batch": 2, "length": 150, "heads": 32, "groups": 2, "N": N}
    assert_kernel_matches_reference(impl, dtype, regime, **shape)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("length", (1, 2, 15, 63, 64, 65, 127, 1000))
def test_kernel_matches_reference_at_every_length(needs_gpu, length, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, batch=2, length=length, heads=32, N=128)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("batch, length, heads", [(1, 4096, 16), (1, 5000, 2), (2, 2048, 24)])
def test_few_heads_in_splits_match_reference(needs_gpu, batch, length, heads, impl, dtype):
    inputs = SSD.per_token(make(batch=batch, length=length, heads=heads, N=128, dtype=dtype))
    assert_accurate(run(impl), run("reference"), inputs, SSD.arguments, dtype)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("heads, groups", [(24, 1), (24, 24), (33, 11), (132, 2), (260, 1)])
def test_kernel_matches_reference_for_any_number_of_heads(needs_gpu, heads, groups, impl, dtype):
    assert_kernel_matches_reference(impl, dtype, heads=heads, groups=groups, N=64)
