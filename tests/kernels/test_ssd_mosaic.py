"""The Hopper kernels of SSD: right in the interpreter, lowered without a GPU, right on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gt_jax.kernels import choose_impl, hopper, mosaic, ssd
from gt_jax.kernels.cases import SSD_REGIMES, segments, ssd_inputs
from gt_jax.kernels.ssd.mosaic import ssd_mosaic
from gt_jax.kernels.ssd.reference import ssd_reference
from tests.kernels.accuracy import TOLERANCE, assert_accurate, errors, values_and_gradients

with hopper.simulated("lower"):
    too_old = pytest.mark.skipif(bool(hopper.unsupported()), reason=str(hopper.unsupported()))


@pytest.fixture
def float64_in_every_thread():  # the interpreter's own among them
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def needs_hopper():
    if hopper.unsupported():
        pytest.skip(hopper.unsupported())


def make(regime="typical", batch=1, length=130, heads=2, groups=1, N=64, seed=0):
    """Inputs of the kernel: x, B and C in bfloat16, the rest in float32."""
    arrays = ssd_inputs(regime, batch, length, heads, groups, 64, N, seed=seed)
    return tuple(
        jnp.asarray(z, jnp.bfloat16 if n in (0, 3, 4) else jnp.float32)
        for n, z in enumerate(arrays)
    )


def per_token(x, dt, A, *rest):
    """The log decay of each token in place of the rate of each head, of which there are few."""
    return (x, dt, dt * A, *rest)


def run(impl, resets=None):
    return lambda *arrays: impl(*arrays, resets, "default")


NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


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
    inputs = per_token(*make(regime, 1, length, heads, groups, N))
    with hopper.simulated("interpret"):
        assert_accurate(run(ssd_mosaic), run(ssd_reference), inputs, NAMES, "bfloat16")


@too_old
def test_interpreted_kernel_starts_segments_from_zero(float64_in_every_thread):
    resets = jnp.asarray(np.diff(segments(1, 130), axis=1, prepend=0) > 0)
    inputs = per_token(*make())
    with hopper.simulated("interpret"):
        candidate, reference = run(ssd_mosaic, resets), run(ssd_reference, resets)
        assert_accurate(candidate, reference, inputs, NAMES, "bfloat16")


@too_old
def test_interpreted_states_keep_float32_over_many_chunks(float64_in_every_thread):
    *inputs, state = per_token(*make("near_one", length=1280))
    inputs = (*inputs, jnp.zeros_like(state))  # all that is in the state came slowly
    with hopper.simulated("interpret"):
        found = errors(run(ssd_mosaic), run(ssd_reference), inputs, NAMES)
    assert found["final_state"] < TOLERANCE["bfloat16"]
    assert found["d_initial_state"] < TOLERANCE["bfloat16"]


@too_old
def test_interpreted_pieces_of_a_sequence_join_exactly(float64_in_every_thread, monkeypatch):
    monkeypatch.setattr(mosaic, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 2)
    inputs = per_token(*make(length=180))  # pieces of two chunks, the second one padded
    with hopper.simulated("interpret"):
        assert_accurate(run(ssd_mosaic), run(ssd_reference), inputs, NAMES, "bfloat16")


@too_old
@pytest.mark.parametrize("heads, groups", [(4, 2), (3, 1)])
@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("length", (64, 130, 2048))  # the longest in pieces
def test_kernels_lower_for_a_gpu_that_is_not_there(length, N, heads, groups):
    inputs = per_token(*make(batch=2, length=length, heads=heads, groups=groups, N=N))

    def gradients(*arrays):
        outputs, pull_back = jax.vjp(run(ssd_mosaic), *arrays)
        return pull_back(outputs)

    with hopper.simulated("lower"):
        jax.jit(run(ssd_mosaic)).trace(*inputs).lower(lowering_platforms=("cuda",))
        jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))


@too_old
def test_kernels_lower_under_vmap_remat_and_scan():
    inputs = per_token(*make(length=64))

    def layers(*arrays):
        def layer(x, _):
            return jax.checkpoint(run(ssd_mosaic))(x, *arrays[1:])[0], None

        return jax.lax.scan(layer, arrays[0], None, length=2)[0].astype(jnp.float32).sum()

    stacked = tuple(jnp.stack([z, z]) for z in inputs)
    with hopper.simulated("lower"):
        gradient = jax.jit(jax.vmap(jax.grad(layers, range(7))))
        gradient.trace(*stacked).lower(lowering_platforms=("cuda",))


@too_old
def test_kernels_lower_under_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    rows = P("batch")
    part = jax.shard_map(
        run(ssd_mosaic),
        mesh=mesh,
        in_specs=(rows, rows, rows, rows, rows, P(), rows),
        out_specs=rows,
        check_vma=False,
    )
    inputs = per_token(*make(batch=2, length=64))
    with hopper.simulated("lower"):
        jax.jit(part).trace(*inputs).lower(lowering_platforms=("cuda",))


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


def test_without_a_hopper_gpu_auto_is_chunked_and_mosaic_says_why():
    if not hopper.unsupported():
        pytest.skip("this is a Hopper GPU")
    x, dt, A, B, C, *_ = make(length=70)
    assert choose_impl("ssd")[0] == "chunked"
    outputs = (ssd(x, dt, A, B, C, impl=impl) for impl in ("auto", "chunked"))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
    with pytest.raises(ValueError, match=rf"cannot run here: .*JAX {jax.__version__}"):
        ssd(x, dt, A, B, C, impl="mosaic")


@functools.cache
def public(impl):
    def function(x, dt, A, B, C, D, initial_state):
        return ssd(x, dt, A, B, C, D=D, initial_state=initial_state, impl=impl)

    return jax.jit(function)


@pytest.mark.gpu
@pytest.mark.parametrize("N", (64, 128))
@pytest.mark.parametrize("regime", SSD_REGIMES)
def test_kernel_matches_reference_in_every_decay_regime(needs_hopper, regime, N):
    inputs = make(regime, batch=2, length=150, heads=32, groups=2, N=N)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("length", (1, 2, 15, 63, 64, 65, 127, 1000, 4096))
def test_kernel_matches_reference_at_every_length(needs_hopper, length):
    inputs = make(batch=2, length=length, heads=32, N=128)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length, heads", [(1, 4096, 64), (1, 5000, 2), (2, 2048, 24)])
def test_few_heads_in_pieces_match_reference(needs_hopper, batch, length, heads):
    inputs = per_token(*make(batch=batch, length=length, heads=heads, N=128))
    candidate, reference = run(ssd_mosaic), run(ssd_reference)
    assert_accurate(candidate, reference, inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("heads, groups", [(24, 1), (24, 24), (33, 11), (132, 2), (260, 1)])
def test_kernel_matches_reference_for_any_number_of_heads(needs_hopper, heads, groups):
    inputs = make(heads=heads, groups=groups, N=64)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
def test_kernel_starts_segments_from_zero(needs_hopper):
    resets = jnp.asarray(np.diff(segments(2, 300), axis=1, prepend=0) > 0)
    inputs = per_token(*make(batch=2, length=300, heads=8, N=128))
    candidate, reference = run(ssd_mosaic, resets), run(ssd_reference, resets)
    assert_accurate(candidate, reference, inputs, NAMES, "bfloat16")


@pytest.mark.gpu
def test_state_carries_over_a_split_with_its_gradient(needs_hopper):
    def in_two(x, dt, A, B, C, D, state):
        first, second = (
            [z[:, part] for z in (x, dt, B, C)] for part in (slice(77), slice(77, None))
        )
        run = lambda x, dt, B, C, state: public("mosaic")(x, dt, A, B, C, D, state)
        y, state = run(*first, state)
        rest, state = run(*second, state)
        return jnp.concatenate([y, rest], axis=1), state

    assert_accurate(in_two, public("reference"), make(heads=32, N=128), NAMES, "bfloat16")


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_alone_again_and_in_a_batch(needs_hopper):
    inputs = make(batch=4, length=900, heads=64, N=128)  # too short for pieces, even alone
    both = lambda z: values_and_gradients(public("mosaic"), z, (z[0], z[-1]))
    first = both(inputs)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, first, both(inputs))
    x, dt, A, B, C, D, state = inputs
    y, final = public("mosaic")(x[1:2], dt[1:2], A, B[1:2], C[1:2], D, state[1:2])
    np.testing.assert_array_equal(y, first[0][0][1:2])
    np.testing.assert_array_equal(final, first[0][1][1:2])


@pytest.mark.gpu
def test_kernel_keeps_nan_of_another_row_or_a_later_chunk_there(needs_hopper):
    x, dt, A, B, C, D, state = make(batch=2, length=130, heads=4)
    poison = lambda z: z.at[1].set(jnp.nan).at[0, 128:].set(jnp.nan)
    y, _ = public("mosaic")(poison(x), poison(dt), A, poison(B), poison(C), D, state)
    expected, _ = public("mosaic")(x, dt, A, B, C, D, state)
    np.testing.assert_array_equal(y[0, :128], expected[0, :128])


@pytest.mark.gpu
def test_kernel_under_vmap_equals_a_loop(needs_hopper):
    inputs = [make(heads=4, seed=seed) for seed in range(2)]
    together = jax.vmap(public("mosaic"))(*(jnp.stack(z) for z in zip(*inputs)))
    for n in range(2):
        apart = public("mosaic")(*inputs[n])
        jax.tree.map(np.testing.assert_array_equal, [z[n] for z in together], list(apart))


@pytest.mark.gpu
def test_auto_takes_the_kernel(needs_hopper):
    x, dt, A, B, C, *_ = make(length=70)
    assert choose_impl("ssd")[0] == "mosaic"
    outputs = (ssd(x, dt, A, B, C, impl=impl) for impl in ("auto", "mosaic"))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
