"""The kernels of linear recurrences: right in the interpreter, lowered for every kind of GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import gated_scan, linear_scan, memory_scan
from gt_jax.kernels.pallas import devices, warps
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models import FUSIONS, ModelConfig, scans
from tests.kernels.elementwise.linear_scan_cases import (
    NEAR_LASTING,
    case,
    check,
    gated_in_float64,
    in_float64,
    lasting_case,
    memory_in_float64,
    resets_of,
    scores_of,
)
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that makes the GPU one that so many blocks fill, and tiles short."""
    from gt_jax.kernels.elementwise import linear_scan_grids

    monkeypatch.setattr(linear_scan_grids, "_SPAN", 2)
    monkeypatch.setattr(linear_scan_grids, "_LEAST_TILES", 1)
    jax.clear_caches()  # kernels of a shape are lowered once
    return lambda blocks: monkeypatch.setattr(warps, "blocks_at_once", lambda: blocks)


def with_gradients(scan, arrays, g):
    s, pull_back = jax.vjp(scan, *arrays)
    return s, *pull_back(g)


kernels = lambda *arrays: with_gradients(linear_scan.scan, arrays[:-1], arrays[-1])


# Four splits of one tile, two of two; channels that are padded.
@pytest.mark.parametrize("blocks, shape", [(8, (1, 27, 4)), (4, (1, 30, 3))], ids=str)
def test_interpreted_kernels_match_the_recurrence_in_float64(
    float64_in_every_thread, gpu_of, blocks, shape
):
    gpu_of(blocks)
    arrays = case(*shape)
    with devices.simulated("interpret"):
        run = jax.jit(kernels)
        found, again = run(*arrays), run(*arrays)
    for z, repeated, expected in zip(found, again, in_float64(*arrays), strict=True):
        assert z.dtype == jnp.float32
        np.testing.assert_array_equal(z, repeated)
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# Of an array's largest number: bfloat16 rounds what it holds, and the s that the rest is made of.
NEAR = {"bfloat16": 2**-8, "float32": 2e-6}

# dtype, blocks at a time, tokens
CALLS = [("bfloat16", 8, 27), ("float32", 1, 27), ("float32", 1, 75)]


@pytest.mark.parametrize("dtype, blocks, length", CALLS)
def test_interpreted_gates_match_a_mingru_in_float64(
    float64_in_every_thread, gpu_of, dtype, blocks, length
):
    """Two models under vmap, documents, shut and open gates; four splits, and none, of one tile
    and of three."""
    gpu_of(blocks)
    rng = np.random.default_rng(0)
    gates = rng.normal(size=(2, 1, length, 8)) * rng.choice(
        [1, 30], (2, 1, length, 1), p=[0.9, 0.1]
    )
    gates = jnp.asarray(gates, dtype)
    _, g, state, _ = (z[:, None] for z in case(2, length, 4))
    resets = jnp.asarray(rng.random((2, 1, length)) < 0.2, jnp.int32).at[:, :, 0].set(0)
    head = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)

    def run(gates, head, state, resets, *cotangents):
        scan = lambda *z: gated_scan.scan(*z, resets)
        (score, last), *gradients = with_gradients(scan, (gates, head, state), cotangents)
        return score, last, *gradients

    cotangents = g[..., 0], g[:, :, 3]
    with devices.simulated("interpret"):
        found = jax.jit(jax.vmap(run))(gates, head, state, resets, *cotangents)
    for model in range(2):
        given = (z[model] for z in (gates, head, state, resets, *cotangents))
        for z, expected in zip(found, gated_in_float64(*given), strict=True):
            error = NEAR[dtype] * np.abs(expected).max()
            np.testing.assert_allclose(np.float64(z[model]), expected, rtol=0, atol=error)


@pytest.mark.parametrize("dtype, blocks, length", CALLS)
def test_interpreted_memories_match_the_recurrence_in_float64(
    float64_in_every_thread, gpu_of, dtype, blocks, length
):
    """Documents, shut and open gates; four splits, and none, of one tile and of three."""
    gpu_of(blocks)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, length, 8)) * rng.choice([1, 30], (1, length, 1), p=[0.9, 0.1])
    scores, c, ds = (jnp.asarray(z, dtype) for z in (scores, *rng.normal(size=(2, 1, length, 4))))
    bias, state, d_last = jnp.asarray(rng.normal(size=(3, 1, 4)), jnp.float32)
    resets = jnp.asarray(rng.random((1, length)) < 0.2, jnp.int32).at[:, 0].set(0)
    scan = lambda *z: memory_scan.scan(*z, resets)
    with devices.simulated("interpret"):
        run = jax.jit(lambda *z: jax.tree.leaves(with_gradients(scan, z[:4], z[4:])))
        found = run(scores, c, bias[0], state, ds, d_last)
    wanted = memory_in_float64(scores, c, bias[0], state, resets, ds, d_last)
    for z, expected in zip(found, wanted, strict=True):
        error = NEAR[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(np.float64(z), expected, rtol=0, atol=error)


def test_sequences_under_vmap_and_segments_equal_the_plain_form(gpu_of):
    gpu_of(4)  # by two slabs of channels of each
    with jax.enable_x64(False):
        decay, x, state, g = (z.reshape(2, 1, *z.shape[1:]) for z in case(2, 18, 16))
        ids = jnp.asarray(np.arange(18) // 5 % 2)[None]
        x = x.astype(jnp.bfloat16)  # as branches of a model are

        def run(impl):
            scan = lambda a, x, s: scans.linear_scan(a, x.astype(a.dtype), s, ids, impl=impl)
            return jax.jit(jax.vmap(lambda *z: with_gradients(scan, z[:-1], z[-1])))(
                decay, x, state, g
            )

        expected = run("chunked")
        with devices.simulated("interpret"):
            found = run("auto")
    for z, want in zip(found, expected, strict=True):
        assert z.dtype == want.dtype
        rounding = 2**-7 if z.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(*(np.float32(y) for y in (z, want)), rtol=rounding, atol=1e-6)


# In the interpreter a block has four rows of threads, on a GPU 4 to 128.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(8, 2048, 192), (8, 2048, 3), (576, 64, 192), (300, 1000, 100), (1, 65537, 40), (1, 17, 4)],
    ids=str,
)
def test_kernels_match_the_recurrence_in_float64(shape):
    if reason := devices.portable_unsupported():
        pytest.skip(reason)
    arrays = case(*shape)
    run = jax.jit(kernels)
    found, again = run(*arrays), run(*arrays)
    for z, repeated, expected in zip(found, again, in_float64(*arrays), strict=True):
        np.testing.assert_array_equal(z, repeated)
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 2048, 192), (576, 64, 192), (1, 65537, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gates_match_a_mingru_in_float64(shape, dtype):
    if reason := devices.portable_unsupported():
        pytest.skip(reason)
    B, T, C = shape
    rng = np.random.default_rng(0)
    gates = jnp.asarray(rng.normal(size=(B, T, 2 * C)), dtype)
    resets = jnp.asarray(rng.random((B, T)) < 0.01, jnp.int32).at[:, 0].set(0)
    head = jnp.asarray(rng.normal(size=C), jnp.float32)
    _, _, state, g = case(*shape)
    cotangents = g[..., 0], g[:, 1]
    scan = lambda *z: gated_scan.scan(*z, resets)
    run = jax.jit(lambda *z: jax.tree.leaves(with_gradients(scan, z[:3], z[3:])))
    given = gates, head, state, *cotangents
    found, again = run(*given), run(*given)
    wanted = gated_in_float64(gates, head, state, resets, *cotangents)
    for z, repeated, expected in zip(found, again, wanted, strict=True):
        np.testing.assert_array_equal(z, repeated)
        error = NEAR[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(np.float64(z), expected, rtol=0, atol=error)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 2048, 128), (576, 64, 192), (1, 65537, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memories_match_the_recurrence_in_float64(shape, dtype):
    if reason := devices.portable_unsupported():
        pytest.skip(reason)
    B, T, C = shape
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    scores, c, ds = draw(B, T, 2 * C), draw(B, T, C), draw(B, T, C)
    resets = jnp.asarray(rng.random((B, T)) < 0.01, jnp.int32).at[:, 0].set(0)
    state, bias, d_last = jnp.asarray(rng.normal(size=(3, B, C)), jnp.float32)
    scan = lambda *z: memory_scan.scan(*z, resets)
    run = jax.jit(lambda *z: jax.tree.leaves(with_gradients(scan, z[:4], z[4:])))
    given = scores, c, bias[0], state, ds, d_last
    found, again = run(*given), run(*given)
    wanted = memory_in_float64(scores, c, bias[0], state, resets, ds, d_last)
    for z, repeated, expected in zip(found, again, wanted, strict=True):
        np.testing.assert_array_equal(z, repeated)
        error = NEAR[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(np.float64(z), expected, rtol=0, atol=error)


# Wide slabs in clusters of 2, 4 and 8 blocks on an H200, narrow ones, and splits. In more tokens
# the rounding of decays that are nearly 1 adds up to more.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(8, 700, 192), (8, 700, 128), (2, 1300, 256), (300, 500, 40), (1, 700, 8)],
    ids=str,
)
def test_states_that_last_match_float64(shape):
    if reason := devices.portable_unsupported():
        pytest.skip(reason)
    B, T, C = shape
    near, resets = NEAR_LASTING["float32"], resets_of(B, T)
    arrays = lasting_case(shape)
    check(jax.jit(kernels)(*arrays), in_float64(*arrays), near)

    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    c, ds, d_score, bias = draw(B, T, C), draw(B, T, C), draw(B, T), draw(C)
    state, d_last = draw(B, C), draw(B, C)
    gates, scores = scores_of(shape, "float32", C, -1), scores_of(shape, "float32", 0, 1)
    for scan, recurrence, inputs, cotangents in (
        (gated_scan.scan, gated_in_float64, (gates, bias, state), (d_score, d_last)),
        (memory_scan.scan, memory_in_float64, (scores, c, bias, state), (ds, d_last)),
    ):
        run = jax.jit(
            lambda inputs, g, scan=scan: with_gradients(lambda *z: scan(*z, resets), inputs, g)
        )
        found = jax.tree.leaves(run(inputs, cotangents))
        check(found, recurrence(*inputs, resets, *cotangents), near)


@pytest.fixture
def float32_parameters():
    """As models draw them for users."""
    with jax.enable_x64(False):
        yield


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize(
    "capability, name, kernel",
    [((8, 0), "mingru", "gated_scan"), ((12, 0), "pscan", "memory_scan")],
    ids=str,
)
def test_an_arbiter_lowers_to_one_kernel_a_direction(float32_parameters, capability, name, kernel):
    arbiter = FUSIONS[name](ModelConfig(vocab_size=8, dim=32, heads=1, dtype="bfloat16"))
    more = {"block_input"} if name == "pscan" else set()
    branch = jax.ShapeDtypeStruct((2, 64, 32), jnp.bfloat16)
    call = lambda params, x: arbiter.apply(params, x, x, **dict.fromkeys(more, x))[0]
    loss = lambda params, x: jnp.sum(call(params, x).astype(jnp.float32))
    jax.clear_caches()
    with devices.simulated("lower"), lowered_for(capability):
        params = jax.eval_shape(arbiter.init, jax.random.key(0), branch, branch)
        traced = jax.jit(jax.grad(loss)).trace(params, branch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"{kernel}_forward_mosaic_gpu") == 1
    assert text.count(f"{kernel}_backward_mosaic_gpu") == 1


@pytest.mark.parametrize(
    "impl, length, dtype",
    [("chunked", 64, "float32"), ("auto", 8, "float32"), ("auto", 64, "float64")],
)
def test_short_wide_or_plainly_computed_sequences_take_no_kernel(impl, length, dtype):
    arrays = [jax.ShapeDtypeStruct((2, length, 4), dtype)] * 2
    with devices.simulated("lower"):
        assert not linear_scan.fits(impl, *arrays)
        assert linear_scan.fits("auto", *[jax.ShapeDtypeStruct((2, 64, 4), "float32")] * 2)
