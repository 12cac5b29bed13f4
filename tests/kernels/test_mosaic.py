"""What all Pallas kernels do alike: segments, splits, transformations, and being chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gt_jax.kernels import choose_impl
from gt_jax.kernels.cases import segments
from gt_jax.kernels.pallas import devices, launch, splits
from gt_jax.kernels.pallas.architectures import OLDEST, lowered_for
from tests.kernels.accuracy import assert_accurate, values_and_gradients
from tests.kernels.conftest import UNSUPPORTED
from tests.kernels.hopper_kernels import each_kernel, each_kernel_and_dtype, too_old


def lower(function, *inputs):
    with devices.simulated("lower"):
        jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))


def assert_starts_segments_from_zero(kernel, impl, dtype, length, **shape):
    batch = shape.get("batch", 1)
    resets = jnp.asarray(np.diff(segments(batch, length), axis=1, prepend=0) > 0)
    inputs = kernel.per_token(kernel.make(length=length, dtype=dtype, **shape))
    candidate, reference = (kernel.run(name, resets) for name in (impl, "reference"))
    assert_accurate(candidate, reference, inputs, kernel.arguments, dtype)


@too_old
@each_kernel_and_dtype
def test_interpreted_kernel_starts_segments_from_zero(float64_in_every_thread, kernel, impl, dtype):
    with devices.simulated("interpret"):
        assert_starts_segments_from_zero(kernel, impl, dtype, 130)


@too_old
@each_kernel
@pytest.mark.parametrize("read", [True, False], ids=["state read", "state unread"])
def test_interpreted_kernel_of_one_chunk_without_initial_state_matches_reference(
    float64_in_every_thread, kernel, impl, read
):
    *inputs, _ = kernel.per_token(kernel.make(length=64, heads=1))

    def without(name):
        def call(*z):
            y, state = kernel.run(name)(*z, None)
            return y, state if read else jax.lax.stop_gradient(state)

        return call

    with devices.simulated("interpret"):
        candidate, reference = without(impl), without("reference")
        assert_accurate(candidate, reference, inputs, kernel.arguments[:-1], "bfloat16")


@too_old
@each_kernel
def test_a_call_without_states_fills_none_with_zeros(kernel, impl):
    *inputs, state = kernel.per_token(kernel.make(length=8, heads=1))

    def gradients(*inputs):
        y, pull_back = jax.vjp(lambda *z: kernel.run(impl)(*z, None)[0], *inputs)
        return pull_back(y)

    with devices.simulated("lower"):
        traced = jax.jit(gradients).trace(*inputs)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    fills = [line for line in lowered.splitlines() if "stablehlo.broadcast_in_dim" in line]
    assert not [line for line in fills if f"{state.shape[1]}x64x{state.shape[-1]}xf32>" in line]


@too_old
@each_kernel_and_dtype
def test_interpreted_splits_of_a_sequence_join_exactly(
    float64_in_every_thread, monkeypatch, kernel, impl, dtype
):
    monkeypatch.setattr(splits, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(launch, "MULTIPROCESSORS", 4)
    # Splits of two chunks, the second one of the last padded.
    inputs = kernel.per_token(kernel.make(length=180, dtype=dtype))
    with devices.simulated("interpret"):
        candidate, reference = kernel.run(impl), kernel.run("reference")
        assert_accurate(candidate, reference, inputs, kernel.arguments, dtype)


@too_old
@each_kernel_and_dtype
def test_kernels_lower_under_vmap_remat_and_scan(kernel, impl, dtype):
    inputs = kernel.per_token(kernel.make(length=64, dtype=dtype))

    def layers(*arrays):
        def layer(x, _):
            return jax.checkpoint(kernel.run(impl))(x, *arrays[1:])[0], None

        return jax.lax.scan(layer, arrays[0], None, length=2)[0].astype(jnp.float32).sum()

    stacked = tuple(jnp.stack([z, z]) for z in inputs)
    lower(jax.vmap(jax.grad(layers, range(len(inputs)))), *stacked)


@too_old
@each_kernel_and_dtype
def test_kernels_lower_under_shard_map(kernel, impl, dtype):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    rows = P("batch")
    inputs = kernel.make(batch=2, length=64, dtype=dtype)
    specs = tuple(P() if name in kernel.of_heads else rows for name in kernel.arguments)
    shard = jax.shard_map(
        kernel.call(impl), mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False
    )

    def gradients(*inputs):
        outputs, pull_back = jax.vjp(shard, *inputs)
        return pull_back(outputs)

    lower(gradients, *inputs)


@each_kernel
def test_without_its_gpu_a_kernel_says_why_and_auto_takes_another(kernel, impl):
    if not UNSUPPORTED[impl]():
        pytest.skip("it runs on this GPU")
    inputs = kernel.make(length=70)
    taken = choose_impl(kernel.name)[0]
    assert taken == ("chunked" if UNSUPPORTED["portable"]() else "portable")
    outputs = (kernel.public(name)(*inputs) for name in ("auto", taken))
    jax.tree.map(np.testing.assert_array_equal, *outputs)
    with pytest.raises(ValueError, match=rf"cannot run here: .*JAX {jax.__version__}"):
        kernel.public(impl)(*inputs)


@pytest.mark.gpu
@each_kernel_and_dtype
def test_auto_takes_the_fastest_kernel(needs_gpu, kernel, impl, dtype):
    fastest = "portable" if UNSUPPORTED["mosaic"]() else "mosaic"
    assert choose_impl(kernel.name)[0] == fastest
    inputs = kernel.make(length=70, dtype=dtype)
    outputs = (kernel.public(name)(*inputs) for name in ("auto", fastest))
    jax.tree.map(np.testing.assert_array_equal, *outputs)


@pytest.mark.gpu
@each_kernel
def test_portable_kernel_lowered_for_the_oldest_gpu_gives_the_same_bits(needs_gpu, kernel, impl):
    if impl != "portable":
        pytest.skip("Hopper kernels need a Hopper GPU")
    inputs = kernel.make(batch=2, length=300, heads=8, **kernel.released)
    like_output = kernel.arguments.index("v" if "v" in kernel.arguments else "x")
    cotangents = (inputs[like_output], inputs[-1])
    both = lambda *z: values_and_gradients(kernel.call(impl), *z)
    found = jax.jit(both)(inputs, cotangents)
    jax.clear_caches()
    with lowered_for(OLDEST):
        older = jax.jit(both).lower(inputs, cotangents).compile()
    jax.tree.map(np.testing.assert_array_equal, found, older(inputs, cotangents))


@pytest.mark.gpu
@each_kernel_and_dtype
def test_kernel_starts_segments_from_zero(needs_gpu, kernel, impl, dtype):
    assert_starts_segments_from_zero(kernel, impl, dtype, 300, batch=2, heads=8, **kernel.released)


@pytest.mark.gpu
@each_kernel_and_dtype
def test_state_carries_over_a_split_with_its_gradient(needs_gpu, kernel, impl, dtype):
    whole = (*kernel.of_heads, "initial_state")

    def in_two(*inputs):
        state, outputs = inputs[-1], []
        for tokens in (slice(77), slice(77, None)):
            some = [
                z if name in whole else z[:, tokens] for name, z in zip(kernel.arguments, inputs)
            ]
            y, state = kernel.public(impl)(*some[:-1], state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    inputs = kernel.make(heads=32, dtype=dtype, **kernel.released)
    assert_accurate(in_two, kernel.public("reference"), inputs, kernel.arguments, dtype)


@pytest.mark.gpu
@each_kernel_and_dtype
def test_kernel_gives_the_same_bits_alone_again_and_in_a_batch(needs_gpu, kernel, impl, dtype):
    # Too short for splits, even alone.
    inputs = kernel.make(batch=4, length=900, heads=64, dtype=dtype, **kernel.released)
    like_output = inputs[kernel.arguments.index("v" if "v" in kernel.arguments else "x")]
    cotangents = (like_output, inputs[-1])
    both = lambda z: values_and_gradients(kernel.public(impl), z, cotangents)
    first = both(inputs)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, first, both(inputs))
    one = [z if n in kernel.of_heads else z[1:2] for n, z in zip(kernel.arguments, inputs)]
    for alone, among in zip(kernel.public(impl)(*one), first[0]):
        np.testing.assert_array_equal(alone, among[1:2])


@pytest.mark.gpu
@each_kernel_and_dtype
def test_kernel_keeps_nan_of_another_row_or_a_later_chunk_there(needs_gpu, kernel, impl, dtype):
    inputs = kernel.make(batch=2, length=130, heads=4, dtype=dtype)
    clean = (*kernel.of_heads, "initial_state")
    poisoned = [
        z if name in clean else z.at[1].set(jnp.nan).at[0, 128:].set(jnp.nan)
        for name, z in zip(kernel.arguments, inputs)
    ]
    found, _ = kernel.public(impl)(*poisoned)
    expected, _ = kernel.public(impl)(*inputs)
    np.testing.assert_array_equal(found[0, :128], expected[0, :128])


@pytest.mark.gpu
@each_kernel_and_dtype
def test_kernel_under_vmap_equals_a_loop(needs_gpu, kernel, impl, dtype):
    inputs = [kernel.make(heads=4, seed=seed, dtype=dtype) for seed in range(2)]
    together = jax.vmap(kernel.public(impl))(*(jnp.stack(z) for z in zip(*inputs)))
    for n in range(2):
        apart = kernel.public(impl)(*inputs[n])
        jax.tree.map(np.testing.assert_array_equal, [z[n] for z in together], list(apart))


@pytest.mark.gpu
@each_kernel
def test_kernel_spread_over_devices_equals_one(needs_gpu, kernel, impl):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    inputs = kernel.make(batch=2 * devices, length=130, heads=64)  # too many heads for splits
    specs = tuple(P() if name in kernel.of_heads else P("batch") for name in kernel.arguments)
    spread = jax.shard_map(
        kernel.call(impl), mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=False
    )
    found, expected = jax.jit(spread)(*inputs), kernel.public(impl)(*inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.gpu
@each_kernel
def test_kernel_reaches_elements_beyond_two_to_the_31(large_gpu, kernel, impl):
    some = kernel.make(length=1024, heads=64, **kernel.released)

    def repeat(name, z, rows, times):
        if name in kernel.of_heads:
            return z
        if name != "initial_state":
            z = jnp.tile(z, (1, times, *(1,) * (z.ndim - 2)))
        return jnp.concatenate([jnp.roll(z, 7 * n, axis=1) for n in range(rows)])

    def both(inputs):
        like_output = inputs[kernel.arguments.index("v" if "v" in kernel.arguments else "x")]
        return values_and_gradients(kernel.public(impl), inputs, (like_output, inputs[-1]))

    few = [repeat(name, z, 3, 64) for name, z in zip(kernel.arguments, some)]
    values, gradients = both(few)
    expected = [*values, *(g for g in gradients if g.shape[0] == 3)]
    many = [z if z.shape[0] != 3 else jnp.tile(z, (3, *(1,) * (z.ndim - 1))) for z in few]
    assert max(z.size for z in many) > 2**31
    values, gradients = both(many)
    found = [*values, *(g for g in gradients if g.shape[0] == 9)]
    assert len(found) == len(expected) == len(some) + 2 - len(kernel.of_heads)
    for z, rows in zip(found, expected):
        assert all(bool(jnp.array_equal(z[n : n + 3], rows)) for n in (0, 3, 6))


@pytest.mark.gpu
@each_kernel
def test_kernel_takes_more_rows_than_an_axis_of_a_grid_has(needs_gpu, kernel, impl):
    inputs = kernel.make(batch=65540, length=8, heads=2)
    last = [z if n in kernel.of_heads else z[-3:] for n, z in zip(kernel.arguments, inputs)]
    like_output = kernel.arguments.index("v" if "v" in kernel.arguments else "x")
    values, gradients = values_and_gradients(
        kernel.public(impl), inputs, (inputs[like_output], inputs[-1])
    )
    expected, of_last = values_and_gradients(
        kernel.public(impl), last, (last[like_output], last[-1])
    )
    jax.tree.map(lambda z, y: np.testing.assert_array_equal(z[-3:], y), values, expected)
    for name, z, y in zip(kernel.arguments, gradients, of_last):
        if name not in kernel.of_heads:
            # A float32 product beside the kernels may add in another order for so many rows.
            wrong = 4 * np.finfo(np.float32).eps if z.dtype == "float32" else 0
            wrong *= np.abs(np.asarray(y, np.float32)).max()
            np.testing.assert_allclose(z[-3:], y, rtol=0, atol=wrong)
