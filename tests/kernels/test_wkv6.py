"""WKV6: every implementation equals the definition, for every decay, length and way of cutting."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gt_jax.kernels import wkv6, wkv6_step
from gt_jax.kernels.cases import LENGTHS, WKV6_REGIMES, segments, wkv6_inputs
from gt_jax.kernels.chunks import make_plan
from gt_jax.kernels.wkv6.chunked import wkv6_chunked
from tests.kernels.accuracy import (
    assert_accurate,
    relative_rms,
    values_and_gradients,
)

NAMES = ("r", "k", "v", "w", "u", "initial_state")
DTYPES = ("float64", "float32", "bfloat16")


@functools.cache
def run(impl, precision="default"):
    """wkv6 over its six arrays, with the implementation fixed."""

    def function(r, k, v, w, u, initial_state):
        return wkv6(r, k, v, w, u, initial_state=initial_state, impl=impl, precision=precision)

    return jax.jit(function)


def make(dtype, regime="typical", batch=2, length=100, heads=3, K=16, V=8, seed=0):
    """Inputs as a model passes them: r, k, v in `dtype`, the rest in at least float32."""
    arrays = wkv6_inputs(regime, batch, length, heads, K, V, seed=seed)
    wide = jnp.promote_types(dtype, jnp.float32)
    return tuple(jnp.asarray(x, dtype if i < 3 else wide) for i, x in enumerate(arrays))


def test_reference_is_the_formula():
    r, k, v, w, u, state = wkv6_inputs("typical", 2, 9, 3, 4, 5)
    o, final_state = wkv6(*map(jnp.asarray, (r, k, v, w, u)), initial_state=state, impl="reference")
    for b, h in np.ndindex(2, 3):
        S = state[b, h]
        for t in range(9):
            kv = np.outer(k[b, t, h], v[b, t, h])
            expected = r[b, t, h] @ (S + np.diag(u[h]) @ kv)
            np.testing.assert_allclose(o[b, t, h], expected, rtol=1e-12)
            S = np.diag(np.exp(w[b, t, h])) @ S + kv
        np.testing.assert_allclose(final_state[b, h], S, rtol=1e-12)


@pytest.mark.optimized
def test_every_compilation_computes_the_same():
    """Not a matter of course: see _einsum in chunks.py."""
    inputs = make("float32", length=16, heads=4, K=32, V=32)
    results = [jax.jit(lambda *a: run("chunked").__wrapped__(*a))(*inputs) for _ in range(8)]
    for o, final_state in results:
        np.testing.assert_array_equal(o, results[0][0])
        np.testing.assert_array_equal(final_state, results[0][1])
        assert np.isfinite(o).all()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", WKV6_REGIMES)
def test_chunked_matches_reference_in_every_decay_regime(regime, dtype):
    assert_accurate(run("chunked"), run("reference"), make(dtype, regime), NAMES, dtype)


# How a length is cut is the same for every dtype (test_chunks.py), and exact products see it best.
@pytest.mark.parametrize(
    "length, dtype",
    [(n, d) for n in LENGTHS for d in DTYPES if d == "float64" or n in (1, 65, 1000)],
)
def test_chunked_matches_reference_at_every_length(length, dtype):
    inputs = make(dtype, batch=3, length=length, K=8)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, dtype)


@pytest.mark.parametrize("length", (64, 65))
@pytest.mark.parametrize("final_state", (True, False))
def test_chunked_without_initial_state_matches_reference(length, final_state):
    *inputs, _ = make("float64", batch=1, length=length, heads=2, K=4, V=4)

    def without(impl):
        def function(*inputs):
            output, state = run(impl)(*inputs, None)
            return output, state if final_state else jnp.zeros(())

        return function

    candidate, reference = without("chunked"), without("reference")
    assert_accurate(candidate, reference, tuple(inputs), NAMES[:-1], "float64")


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("regime, length", [("typical", 4096), ("near_one", 16384)])
def test_long_accumulation_keeps_its_accuracy(regime, length, dtype):
    inputs = make(dtype, regime, batch=1, length=length, heads=2, K=8, V=8)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, dtype)


@pytest.mark.optimized
def test_chunked_matches_reference_at_65536_tokens():
    inputs = make("float32", batch=1, length=65536, heads=2, K=4, V=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, "float32")


def test_highest_precision_multiplies_bfloat16_inputs_in_float32():
    inputs = tuple(x.astype(jnp.float32) for x in make("bfloat16"))
    rounded = (*(x.astype(jnp.bfloat16) for x in inputs[:3]), *inputs[3:])
    _, state = run("chunked", "highest")(*rounded)
    _, exact = run("reference")(*(x.astype(jnp.float64) for x in inputs))
    assert relative_rms(state, exact) < 1e-6


@pytest.mark.parametrize("heads,batch", [(1, 1), (3, 1), (24, 1), (33, 4), (257, 1)])
def test_chunked_matches_reference_for_any_number_of_heads(heads, batch):
    inputs = make("float32", batch=batch, length=40, heads=heads, K=4, V=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, "float32")


@pytest.mark.parametrize("chunk_size", (2, 16, 64, 128))
def test_chunk_size_does_not_change_the_result(chunk_size):
    def chunked(r, k, v, w, u, state):
        return wkv6_chunked(r, k, v, w, u, state, None, "default", chunk_size=chunk_size)

    assert_accurate(chunked, run("reference"), make("float64", length=150), NAMES, "float64")


def test_packed_segments_equal_separate_calls():
    r, k, v, w, u, state = make("float64", length=50)
    ids = segments(2, 50, mean_length=14)
    ids[:, 30:33] = [7, 8, 7]  # one-token segments, and an id that comes back

    def packed(*arrays, impl):
        *arrays, state = arrays
        return wkv6(*arrays, initial_state=state, segment_ids=ids, impl=impl)

    def separate(r, k, v, w, u, state):
        outputs, states = [], []
        for b in range(2):
            cuts = [0, *(np.flatnonzero(np.diff(ids[b])) + 1), 50]
            S = state[b : b + 1]
            of_row = []
            for start, stop in itertools.pairwise(cuts):
                one = (x[b : b + 1, start:stop] for x in (r, k, v, w))
                o, final = wkv6(*one, u, initial_state=S, impl="reference")
                of_row.append(o)
                S = jnp.zeros_like(S)
            outputs.append(jnp.concatenate(of_row, axis=1))
            states.append(final)
        return jnp.concatenate(outputs), jnp.concatenate(states)

    for impl in ("reference", "chunked"):
        inputs = (r, k, v, w, u, state)
        assert_accurate(functools.partial(packed, impl=impl), separate, inputs, NAMES, "float64")


@pytest.mark.parametrize("impl", ("reference", "chunked"))
def test_state_carries_over_a_split(impl):
    def split(r, k, v, w, u, state):
        outputs = []
        for chunk in (slice(0, 1), slice(1, 37), slice(37, None)):
            one = (x[:, chunk] for x in (r, k, v, w))
            o, state = wkv6(*one, u, initial_state=state, impl=impl)
            outputs.append(o)
        return jnp.concatenate(outputs, axis=1), state

    assert_accurate(split, run("reference"), make("float64"), NAMES, "float64")


def test_step_repeated_equals_the_parallel_form():
    r, k, v, w, u, state = inputs = make("float64", length=40)

    def step(state, token):
        o, state = wkv6_step(*token, u, state)
        return state, o

    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (r, k, v, w))
    final, o = jax.lax.scan(step, state, over_time)
    expected, expected_final = run("chunked")(*inputs)
    assert relative_rms(jnp.moveaxis(o, 0, 1), expected) < 1e-12
    assert relative_rms(final, expected_final) < 1e-12


@pytest.mark.optimized
def test_rows_of_a_batch_do_not_touch_each_other():
    inputs = make("float32", batch=4)
    *arrays, u, state = inputs
    order = np.array([2, 0, 3, 1])
    o, final = run("chunked")(*inputs)
    mixed, mixed_final = run("chunked")(*(x[order] for x in arrays), u, state[order])
    np.testing.assert_array_equal(o[order], mixed)
    np.testing.assert_array_equal(final[order], mixed_final)


@pytest.mark.optimized
def test_same_inputs_give_the_same_bits():
    inputs = make("float32")
    first, again = (run("chunked")(*inputs) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.optimized
def test_vmap_equals_a_loop():
    inputs = [make("float32", seed=seed, length=40) for seed in range(2)]
    together = jax.vmap(run("chunked"))(*(jnp.stack(x) for x in zip(*inputs)))
    apart = [run("chunked")(*x) for x in inputs]
    for i in range(2):
        assert relative_rms(together[0][i], apart[i][0]) < 1e-6


@pytest.mark.parametrize("where", ("right", "left", "middle"))
def test_identity_padding_leaves_the_other_tokens_alone(where):
    r, k, v, w, u, state = make("float64", length=30)
    at = {"left": 0, "middle": 13, "right": 30}[where]
    pad = lambda x: jnp.insert(x, np.full(9, at), 0, axis=1)
    o, final = run("chunked")(*map(pad, (r, k, v, w)), u, state)
    expected, expected_final = run("reference")(r, k, v, w, u, state)
    assert relative_rms(jnp.delete(o, np.arange(at, at + 9), axis=1), expected) < 1e-12
    assert relative_rms(final, expected_final) < 1e-12


@pytest.mark.optimized
def test_nan_of_another_row_or_a_later_token_stays_there():
    r, k, v, w, u, state = make("float32")
    poison = lambda x: x.at[1].set(jnp.nan).at[0, 64:].set(jnp.nan)
    o, _ = run("chunked")(*map(poison, (r, k, v, w)), u, state)
    expected, _ = run("chunked")(r, k, v, w, u, state)
    np.testing.assert_array_equal(o[0, :64], expected[0, :64])


@pytest.mark.optimized
def test_nan_of_another_segment_stays_there():
    r, k, v, w, u, state = make("float32", batch=1, length=64)
    ids = np.repeat([0, 1], [20, 44])[None]
    run_segments = functools.partial(wkv6, initial_state=state, segment_ids=ids, impl="reference")
    poison = lambda x: x.at[:, :20].set(jnp.nan)
    o, final = run_segments(*map(poison, (r, k, v, w)), u)
    assert jnp.isfinite(o[:, 20:]).all() and jnp.isfinite(final).all()


def test_zero_cotangents_give_zero_gradients():
    inputs = make("float32")
    zeros = (jnp.zeros(()), jnp.zeros(()))
    shapes = jax.eval_shape(run("chunked"), *inputs)
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
    for gradient in values_and_gradients(run("chunked"), inputs, zeros)[1]:
        assert not np.any(gradient)


def test_gradients_agree_with_finite_differences():
    inputs = make("float64", batch=1, length=10, heads=2, K=4, V=3)
    check_grads(run("chunked"), inputs, order=1, modes=("rev",), eps=1e-5, rtol=1e-6)


@pytest.mark.optimized
def test_gradient_memory_is_linear_in_time_and_below_eight_times_the_inputs():
    def temporary(length, dtype):
        arrays = make(dtype, batch=1, length=length, heads=4, K=64, V=64)
        gradient = jax.grad(lambda *x: run("chunked")(*x)[0].astype(jnp.float32).sum(), range(6))
        analysis = jax.jit(gradient).lower(*arrays).compile().memory_analysis()
        return analysis.temp_size_in_bytes, sum(x.nbytes for x in arrays)

    for dtype in ("float32", "bfloat16"):
        half, _ = temporary(4096, dtype)
        whole, inputs = temporary(8192, dtype)
        assert whole < 8 * inputs
        assert whole < 2.1 * half


def test_groups_cover_a_long_sequence_with_little_padding():
    for length in (1, 31, 1024, 1025, 5000, 65536):
        plan = make_plan(length, 32, jnp.float32, "default", jnp.float32)
        padded = plan.groups * plan.chunks * plan.steps
        assert length <= padded < length + plan.groups * plan.steps
        assert plan.chunks * plan.steps <= 1024 + 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": jnp.zeros((16, 3))}, r"u has shape \(16, 3\); it must be \(3, 16\)"),
        ({"k": jnp.zeros((2, 5, 3, 16))}, r"k has shape \(2, 5, 3, 16\)"),
        ({"r": jnp.zeros((2, 0, 3, 16))}, "every axis must be at least 1"),
        ({"v": jnp.zeros((2, 100, 3, 8), jnp.bfloat16)}, "share one floating dtype"),
        ({"impl": "mosiac"}, "impl='mosiac' must be one of 'auto'"),
        ({"precision": "low"}, "precision='low' must be"),
    ],
)
def test_wrong_arguments_name_themselves(change, message):
    arguments = dict(zip(NAMES, make("float32"))) | change
    arrays = [arguments.pop(name) for name in "rkvwu"]
    with pytest.raises(ValueError, match=message):
        wkv6(*arrays, **arguments)
