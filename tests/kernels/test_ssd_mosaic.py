"""The Hopper kernels of SSD: right in the interpreter, lowered without a GPU, right on a GPU.

What both kernels do alike is in test_mosaic.py.
"""

import jax
import jax.numpy as jnp
import pytest

from gt_jax.kernels import hopper, ssd
from gt_jax.kernels.cases import SSD_REGIMES
from tests.kernels.accuracy import TOLERANCE, assert_accurate, errors
from tests.kernels.hopper_kernels import SSD, too_old

make, run, public = SSD.make, SSD.run, SSD.public


@too_old
@pytest.mark.parametrize(
    "regime, length, heads, groups, N",
    [
        ("typical", 130, 2, 1, 64),
        ("some_huge_steps", 130, 2, 1, 64),
        ("zero_rows", 64, 2, 1, 128),
        ("wide", 64, 3, 3, 64),
    ],
)
def test_interpreted_kernel_matches_reference(
    float64_in_every_thread, regime, length, heads, groups, N
):
    inputs = SSD.per_token(make(regime, 1, length, heads, groups, N))
    with hopper.simulated("interpret"):
        assert_accurate(run("mosaic"), run("reference"), inputs, SSD.arguments, "bfloat16")


@too_old
def test_interpreted_states_keep_float32_over_many_chunks(float64_in_every_thread):
    *inputs, state = SSD.per_token(make("near_one", length=1280))
    inputs = (*inputs, jnp.zeros_like(state))  # all that is in the state came slowly
    with hopper.simulated("interpret"):
        found = errors(run("mosaic"), run("reference"), inputs, SSD.arguments)
    assert found["final_state"] < TOLERANCE["float32"]  # nor is what comes in rounded
    assert found["d_initial_state"] < TOLERANCE["bfloat16"]


@too_old
@pytest.mark.parametrize("heads, groups", [(4, 2), (3, 1)])
@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("length", (64, 130, 2048))  # the longest in pieces
def test_kernels_lower_for_a_gpu_that_is_not_there(length, N, heads, groups):
    inputs = SSD.per_token(make(batch=2, length=length, heads=heads, groups=groups, N=N))

    def gradients(*arrays):
        outputs, pull_back = jax.vjp(run("mosaic"), *arrays)
        return pull_back(outputs)

    with hopper.simulated("lower"):
        jax.jit(run("mosaic")).trace(*inputs).lower(lowering_platforms=("cuda",))
        jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))


@too_old
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": jnp.float32}, "bfloat16 x with a float32 state; these are float32"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"N": 32}, "this call has P=64, N=32"),
    ],
)
def test_what_the_kernel_does_not_do_is_named(change, message):
    x, dt, A, B, C, *_ = make(length=8, N=change.get("N", 64))
    x, B, C = (z.astype(change.get("dtype", z.dtype)) for z in (x, B, C))
    options = {"precision": change.get("precision", "default"), "impl": "mosaic"}
    with hopper.simulated("lower"), pytest.raises(ValueError, match=message):
        ssd(x, dt, A, B, C, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("regime", SSD_REGIMES)
def test_kernel_matches_reference_in_every_decay_regime(needs_hopper, regime, N):
    inputs = make(regime, batch=2, length=150, heads=32, groups=2, N=N)
    assert_accurate(public("mosaic"), public("reference"), inputs, SSD.arguments, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("length", (1, 2, 15, 63, 64, 65, 127, 1000))
def test_kernel_matches_reference_at_every_length(needs_hopper, length):
    inputs = make(batch=2, length=length, heads=32, N=128)
    assert_accurate(public("mosaic"), public("reference"), inputs, SSD.arguments, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length, heads", [(1, 4096, 16), (1, 5000, 2), (2, 2048, 24)])
def test_few_heads_in_pieces_match_reference(needs_hopper, batch, length, heads):
    inputs = SSD.per_token(make(batch=batch, length=length, heads=heads, N=128))
    candidate, reference = run("mosaic"), run("reference")
    assert_accurate(candidate, reference, inputs, SSD.arguments, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("heads, groups", [(24, 1), (24, 24), (33, 11), (132, 2), (260, 1)])
def test_kernel_matches_reference_for_any_number_of_heads(needs_hopper, heads, groups):
    inputs = make(heads=heads, groups=groups, N=64)
    assert_accurate(public("mosaic"), public("reference"), inputs, SSD.arguments, "bfloat16")
