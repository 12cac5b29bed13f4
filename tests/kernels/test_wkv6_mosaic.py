"""The Hopper kernels of WKV6: right in the interpreter, lowered without a GPU, right on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gt_jax.kernels import choose_impl, hopper, mosaic, wkv6
from gt_jax.kernels.cases import LENGTHS, WKV6_REGIMES, segments, wkv6_inputs
from gt_jax.kernels.wkv6.mosaic import wkv6_mosaic
from gt_jax.kernels.wkv6.reference import wkv6_reference
from tests.kernels.accuracy import assert_accurate, values_and_gradients

with hopper.simulated("lower"):
    too_old = pytest.mark.skipif(bool(hopper.unsupported()), reason=str(hopper.unsupported()))

NAMES = ("r", "k", "v", "w", "u", "initial_state")


@pytest.fixture
def float64_in_every_thread():  # the interpreter's own among them
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def needs_hopper():
    if hopper.unsupported():
        pytest.skip(hopper.unsupported())


def make(regime="typical", batch=1, length=130, heads=2, K=64, V=64, seed=0):
    """Inputs of the kernel: r, k and v in bfloat16, the rest in float32."""
    arrays = wkv6_inputs(regime, batch, length, heads, K, V, seed=seed)
    return tuple(
        jnp.asarray(z, jnp.bfloat16 if n < 3 else jnp.float32) for n, z in enumerate(arrays)
    )


def run(impl, resets=None):
    return lambda *arrays: impl(*arrays, resets, "default")


@too_old
@pytest.mark.parametrize(
    "regime, length, heads, K, V",
    [
        ("typical", 130, 3, 64, 64),
        ("minus_inf", 130, 2, 64, 64),
        ("constants", 64, 1, 64, 64),
        ("strong", 65, 2, 32, 32),
        ("slow", 5, 2, 64, 32),
    ],
)
def test_interpreted_kernel_matches_reference(float64_in_every_thread, regime, length, heads, K, V):
    inputs = make(regime, 1, length, heads, K, V)
    with hopper.simulated("interpret"):
        assert_accurate(run(wkv6_mosaic), run(wkv6_reference), inputs, NAMES, "bfloat16")


@too_old
def test_interpreted_kernel_keeps_every_bit_of_a_state_nothing_changes(float64_in_every_thread):
    r, k, v, w, u, state = make(length=65)
    with hopper.simulated("interpret"):
        _, final_state = wkv6_mosaic(r, 0 * k, v, 0 * w, u, state, None, "default")
    np.testing.assert_array_equal(final_state, state)


@too_old
def test_interpreted_kernel_starts_segments_from_zero(float64_in_every_thread):
    resets = jnp.asarray(np.diff(segments(1, 130), axis=1, prepend=0) > 0)
    with hopper.simulated("interpret"):
        candidate, reference = run(wkv6_mosaic, resets), run(wkv6_reference, resets)
        assert_accurate(candidate, reference, make(), NAMES, "bfloat16")


@too_old
def test_interpreted_pieces_of_a_sequence_join_exactly(float64_in_every_thread, monkeypatch):
    monkeypatch.setattr(mosaic, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 2)
    inputs = make(length=180)  # pieces of two chunks, the second one padded
    with hopper.simulated("interpret"):
        assert_accurate(run(wkv6_mosaic), run(wkv6_reference), inputs, NAMES, "bfloat16")


@too_old
@pytest.mark.parametrize("heads", (1, 4))
@pytest.mark.parametrize("K", (32, 64))
@pytest.mark.parametrize("length", (130, 2048))  # the longer in pieces
def test_kernels_lower_for_a_gpu_that_is_not_there(length, K, heads):
    inputs = make(length=length, heads=heads, K=K, V=K)

    def gradients(*arrays):
        outputs, pull_back = jax.vjp(run(wkv6_mosaic), *arrays)
        return pull_back(outputs)

    with hopper.simulated("lower"):
        jax.jit(run(wkv6_mosaic)).trace(*inputs).lower(lowering_platforms=("cuda",))
        jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))


@too_old
def test_kernels_lower_under_vmap_remat_and_scan():
    inputs = make(length=64)

    def layers(*arrays):
        def layer(r, _):
            return jax.checkpoint(run(wkv6_mosaic))(r, *arrays[1:])[0], None

        return jax.lax.scan(layer, arrays[0], None, length=2)[0].astype(jnp.float32).sum()

    stacked = tuple(jnp.stack([z, z]) for z in inputs)
    with hopper.simulated("lower"):
        gradient = jax.jit(jax.vmap(jax.grad(layers, range(6))))
        gradient.trace(*stacked).lower(lowering_platforms=("cuda",))


@too_old
def test_kernels_lower_under_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    rows = P("batch")
    part = jax.shard_map(
        run(wkv6_mosaic),
        mesh=mesh,
        in_specs=(rows, rows, rows, rows, P(), rows),
        out_specs=rows,
        check_vma=False,
    )
    inputs = make(batch=2, length=64)
    with hopper.simulated("lower"):
        jax.jit(part).trace(*inputs).lower(lowering_platforms=("cuda",))


@too_old
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": jnp.float32}, "bfloat16 r with a float32 state; these are float32"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"K": 128}, "this call has K=128, V=64"),
    ],
)
def test_what_the_kernel_does_not_do_is_named(change, message):
    r, k, v, w, u, _ = make(length=8, K=change.get("K", 64))
    r, k, v = (z.astype(change.get("dtype", z.dtype)) for z in (r, k, v))
    options = {"precision": change.get("precision", "default"), "impl": "mosaic"}
    with hopper.simulated("lower"), pytest.raises(ValueError, match=message):
        wkv6(r, k, v, w, u, **options)


def test_without_a_hopper_gpu_auto_is_chunked_and_mosaic_says_why():
    if not hopper.unsupported():
        pytest.skip("this is a Hopper GPU")
    *inputs, _ = make(length=70)
    assert choose_impl("wkv6")[0] == "chunked"
    outputs = (wkv6(*inputs, impl=impl) for impl in ("auto", "chunked"))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
    with pytest.raises(ValueError, match=rf"cannot run here: .*JAX {jax.__version__}"):
        wkv6(*inputs, impl="mosaic")


@functools.cache
def public(impl):
    def function(r, k, v, w, u, initial_state):
        return wkv6(r, k, v, w, u, initial_state=initial_state, impl=impl)

    return jax.jit(function)


@pytest.mark.gpu
@pytest.mark.parametrize("K", (32, 64))
@pytest.mark.parametrize("regime", WKV6_REGIMES)
def test_kernel_matches_reference_in_every_decay_regime(needs_hopper, regime, K):
    inputs = make(regime, batch=2, length=150, heads=32, K=K, V=K)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("length", (*LENGTHS, 4096))
def test_kernel_matches_reference_at_every_length(needs_hopper, length):
    inputs = make(batch=2, length=length, heads=32)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length, heads", [(1, 4096, 32), (1, 5000, 2), (2, 2048, 12)])
def test_few_heads_in_pieces_match_reference(needs_hopper, batch, length, heads):
    inputs = make(batch=batch, length=length, heads=heads)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", (1, 3, 132, 257))
def test_kernel_matches_reference_for_any_number_of_heads(needs_hopper, heads):
    inputs = make(heads=heads)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
def test_kernel_keeps_slow_channels_over_a_long_sequence(needs_hopper):
    inputs = make("near_one", length=16384, heads=4)
    assert_accurate(public("mosaic"), public("reference"), inputs, NAMES, "bfloat16")


@pytest.mark.gpu
def test_kernel_starts_segments_from_zero(needs_hopper):
    resets = jnp.asarray(np.diff(segments(2, 300), axis=1, prepend=0) > 0)
    candidate, reference = run(wkv6_mosaic, resets), run(wkv6_reference, resets)
    inputs = make(batch=2, length=300, heads=8)
    assert_accurate(candidate, reference, inputs, NAMES, "bfloat16")


@pytest.mark.gpu
def test_state_carries_over_a_split_with_its_gradient(needs_hopper):
    def in_two(*arrays):
        *arrays, u, state = arrays
        first, state = public("mosaic")(*(z[:, :77] for z in arrays), u, state)
        second, state = public("mosaic")(*(z[:, 77:] for z in arrays), u, state)
        return jnp.concatenate([first, second], axis=1), state

    assert_accurate(in_two, public("reference"), make(heads=8), NAMES, "bfloat16")


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_alone_again_and_in_a_batch(needs_hopper):
    inputs = make(batch=4, length=1000, heads=64)
    both = lambda z: values_and_gradients(public("mosaic"), z, (z[2], z[-1]))
    first = both(inputs)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, first, both(inputs))
    r, k, v, w, u, state = inputs
    alone = public("mosaic")(r[1:2], k[1:2], v[1:2], w[1:2], u, state[1:2])
    for one, among in zip(alone, first[0]):
        np.testing.assert_array_equal(one, among[1:2])


@pytest.mark.gpu
def test_kernel_keeps_nan_of_another_row_or_a_later_chunk_there(needs_hopper):
    *arrays, u, state = make(batch=2, length=130, heads=4)
    poison = lambda z: z.at[1].set(jnp.nan).at[0, 128:].set(jnp.nan)
    o, _ = public("mosaic")(*map(poison, arrays), u, state)
    expected, _ = public("mosaic")(*arrays, u, state)
    np.testing.assert_array_equal(o[0, :128], expected[0, :128])


@pytest.mark.gpu
def test_kernel_under_vmap_equals_a_loop(needs_hopper):
    inputs = [make(heads=4, seed=seed) for seed in range(2)]
    together = jax.vmap(public("mosaic"))(*(jnp.stack(z) for z in zip(*inputs)))
    for n in range(2):
        apart = public("mosaic")(*inputs[n])
        jax.tree.map(np.testing.assert_array_equal, [z[n] for z in together], list(apart))


@pytest.mark.gpu
def test_auto_takes_the_kernel(needs_hopper):
    *inputs, _ = make(length=70)
    assert choose_impl("wkv6")[0] == "mosaic"
    outputs = (wkv6(*inputs, impl=impl) for impl in ("auto", "mosaic"))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
