"""SSD: every implementation equals the definition, for every decay, length and way of cutting."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gt_jax.kernels import ssd, ssd_step
from gt_jax.kernels.cases import LENGTHS, SSD_REGIMES, segments, ssd_inputs
from gt_jax.kernels.ssd.chunked import ssd_chunked
from tests.kernels.accuracy import (
    assert_accurate,
    relative_rms,
    values_and_gradients,
)

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
DTYPES = ("float64", "float32", "bfloat16")


@functools.cache
def run(impl, precision="default"):
    """ssd over its seven arrays, with the implementation fixed."""

    def function(x, dt, A, B, C, D, initial_state):
        options = {"impl": impl, "precision": precision}
        return ssd(x, dt, A, B, C, D=D, initial_state=initial_state, **options)

    return jax.jit(function)


def make(dtype, regime="typical", batch=2, length=100, heads=4, groups=2, P=8, N=16, seed=0):
    """Inputs as a model passes them: x, B, C in `dtype`, the rest in at least float32."""
    arrays = ssd_inputs(regime, batch, length, heads, groups, P, N, seed=seed)
    wide = jnp.promote_types(dtype, jnp.float32)
    return tuple(jnp.asarray(x, dtype if i in (0, 3, 4) else wide) for i, x in enumerate(arrays))


def test_reference_is_the_formula():
    x, dt, A, B, C, D, state = ssd_inputs("wide", 2, 9, 4, 2, 5, 3)
    bias = np.linspace(-1, 1, 4)
    y, final_state = ssd(
        *map(jnp.asarray, (x, dt, A, B, C)),
        D=jnp.asarray(D),
        dt_bias=jnp.asarray(bias),
        dt_softplus=True,
        dt_limit=(0.5, 1.5),
        initial_state=jnp.asarray(state),
        impl="reference",
    )
    for b, h in np.ndindex(2, 4):
        S = state[b, h]
        for t in range(9):
            step = np.clip(np.log1p(np.exp(dt[b, t, h] + bias[h])), 0.5, 1.5)
            S = np.exp(step * A[h]) * S + step * np.outer(x[b, t, h], B[b, t, h // 2])
            expected = S @ C[b, t, h // 2] + D[h] * x[b, t, h]
            np.testing.assert_allclose(y[b, t, h], expected, rtol=1e-11)
        np.testing.assert_allclose(final_state[b, h], S, rtol=1e-11)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", SSD_REGIMES)
def test_chunked_matches_reference_in_every_decay_regime(regime, dtype):
    inputs = make(dtype, regime, length=150, heads=32)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, dtype)


# How a length is cut is the same for every dtype (test_chunks.py), and exact products see it best.
@pytest.mark.parametrize(
    "length, dtype",
    [(n, d) for n in LENGTHS for d in DTYPES if d == "float64" or n in (1, 65, 1000)],
)
def test_chunked_matches_reference_at_every_length(length, dtype):
    inputs = make(dtype, batch=4, length=length, heads=32, groups=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, dtype)


@pytest.mark.parametrize("length", (64, 65))
@pytest.mark.parametrize("final_state", (True, False))
def test_chunked_without_initial_state_matches_reference(length, final_state):
    *inputs, _ = make("float64", batch=1, length=length, heads=2, P=4, N=4)

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
    inputs = make(dtype, regime, batch=1, length=length, heads=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, dtype)


@pytest.mark.optimized
def test_chunked_matches_reference_at_65536_tokens():
    inputs = make("float32", batch=1, length=65536, heads=2, groups=1, P=4, N=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, "float32")


@pytest.mark.parametrize("heads,batch", [(1, 1), (3, 1), (24, 1), (33, 4), (257, 1)])
def test_chunked_matches_reference_for_any_number_of_heads(heads, batch):
    inputs = make("float32", batch=batch, length=40, heads=heads, groups=1, P=4, N=4)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, "float32")


@pytest.mark.parametrize("groups", (1, 2, 6))
def test_groups_share_their_projections(groups):
    inputs = make("float64", heads=6, groups=groups)
    assert_accurate(run("chunked"), run("reference"), inputs, NAMES, "float64")


def test_gradients_reach_the_step_size_through_bias_softplus_and_limit():
    x, dt, A, B, C, *_ = make("float64", "wide")
    bias = jnp.linspace(-1.0, 1.0, 4)

    def through(x, dt, A, B, C, bias, *, impl):
        return ssd(x, dt, A, B, C, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 2.0), impl=impl)

    def by_hand(x, dt, A, B, C, bias):
        dt = jnp.clip(jnp.logaddexp(0, dt + bias), 0.1, 2.0)
        return ssd(x, dt, A, B, C, impl="reference")

    inputs, names = (x, dt, A, B, C, bias), ("x", "dt", "A", "B", "C", "dt_bias")
    for impl in ("reference", "chunked"):
        candidate = functools.partial(through, impl=impl)
        assert_accurate(candidate, by_hand, inputs, names, "float64")


@pytest.mark.parametrize("chunk_size", (2, 16, 32, 128))
def test_chunk_size_does_not_change_the_result(chunk_size):
    def chunked(x, dt, A, B, C, D, state):
        a = dt * A
        return ssd_chunked(x, dt, a, B, C, D, state, None, "default", chunk_size=chunk_size)

    assert_accurate(chunked, run("reference"), make("float64", length=150), NAMES, "float64")


def test_packed_segments_equal_separate_calls():
    inputs = make("float64", length=50)
    ids = segments(2, 50, mean_length=14)
    ids[:, 30:33] = [7, 8, 7]  # one-token segments, and an id that comes back

    def packed(x, dt, A, B, C, D, state, *, impl):
        return ssd(x, dt, A, B, C, D=D, initial_state=state, segment_ids=ids, impl=impl)

    def separate(x, dt, A, B, C, D, state):
        outputs, states = [], []
        for b in range(2):
            cuts = [0, *(np.flatnonzero(np.diff(ids[b])) + 1), 50]
            S, of_row = state[b : b + 1], []
            for start, stop in itertools.pairwise(cuts):
                x_, dt_, B_, C_ = (z[b : b + 1, start:stop] for z in (x, dt, B, C))
                y, final = ssd(x_, dt_, A, B_, C_, D=D, initial_state=S, impl="reference")
                of_row.append(y)
                S = jnp.zeros_like(S)
            outputs.append(jnp.concatenate(of_row, axis=1))
            states.append(final)
        return jnp.concatenate(outputs), jnp.concatenate(states)

    for impl in ("reference", "chunked"):
        candidate = functools.partial(packed, impl=impl)
        assert_accurate(candidate, separate, inputs, NAMES, "float64")


@pytest.mark.parametrize("impl", ("reference", "chunked"))
def test_state_carries_over_a_split(impl):
    def split(x, dt, A, B, C, D, state):
        outputs = []
        for chunk in (slice(0, 1), slice(1, 37), slice(37, None)):
            x_, dt_, B_, C_ = (z[:, chunk] for z in (x, dt, B, C))
            y, state = ssd(x_, dt_, A, B_, C_, D=D, initial_state=state, impl=impl)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    assert_accurate(split, run("reference"), make("float64"), NAMES, "float64")


def test_step_repeated_equals_the_parallel_form():
    x, dt, A, B, C, D, state = make("float64", length=40)
    options = {"D": D, "dt_bias": jnp.ones(4), "dt_softplus": True, "dt_limit": (0.5, 1.4)}

    def step(state, token):
        x_t, dt_t, B_t, C_t = token
        y, state = ssd_step(x_t, dt_t, A, B_t, C_t, state, **options)
        return state, y

    final, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(z, 1, 0) for z in (x, dt, B, C)))
    expected, expected_final = ssd(x, dt, A, B, C, initial_state=state, impl="chunked", **options)
    assert relative_rms(jnp.moveaxis(y, 0, 1), expected) < 1e-12
    assert relative_rms(final, expected_final) < 1e-12


@pytest.mark.optimized
def test_rows_of_a_batch_do_not_touch_each_other():
    x, dt, A, B, C, D, state = make("float32", batch=4)
    order = np.array([2, 0, 3, 1])
    y, final = run("chunked")(x, dt, A, B, C, D, state)
    mixed = (x[order], dt[order], A, B[order], C[order], D, state[order])
    mixed, mixed_final = run("chunked")(*mixed)
    np.testing.assert_array_equal(y[order], mixed)
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
    x, dt, A, B, C, D, state = make("float64", length=30)
    at = {"left": 0, "middle": 13, "right": 30}[where]
    pad = lambda z: jnp.insert(z, np.full(9, at), 0, axis=1)
    y, final = run("chunked")(pad(x), pad(dt), A, pad(B), pad(C), D, state)
    expected, expected_final = run("reference")(x, dt, A, B, C, D, state)
    assert relative_rms(jnp.delete(y, np.arange(at, at + 9), axis=1), expected) < 1e-12
    assert relative_rms(final, expected_final) < 1e-12


@pytest.mark.optimized
def test_nan_of_another_row_or_a_later_token_stays_there():
    x, dt, A, B, C, D, state = make("float32", length=130)
    poison = lambda z: z.at[1].set(jnp.nan).at[0, 128:].set(jnp.nan)
    y, _ = run("chunked")(poison(x), poison(dt), A, poison(B), poison(C), D, state)
    expected, _ = run("chunked")(x, dt, A, B, C, D, state)
    np.testing.assert_array_equal(y[0, :128], expected[0, :128])


def test_zero_cotangents_give_zero_gradients():
    inputs = make("float32")
    shapes = jax.eval_shape(run("chunked"), *inputs)
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
    for gradient in values_and_gradients(run("chunked"), inputs, zeros)[1]:
        assert not np.any(gradient)


def test_gradients_agree_with_finite_differences():
    inputs = make("float64", batch=1, length=10, heads=2, P=3, N=4)
    check_grads(run("chunked"), inputs, order=1, modes=("rev",), eps=1e-5, rtol=1e-6)


@pytest.mark.optimized
def test_gradient_memory_is_linear_in_time_and_below_eight_times_the_inputs():
    def temporary(length, dtype):
        arrays = make(dtype, batch=1, length=length, heads=4, groups=1, P=64, N=128)
        gradient = jax.grad(lambda *z: run("chunked")(*z)[0].astype(jnp.float32).sum(), range(7))
        analysis = jax.jit(gradient).lower(*arrays).compile().memory_analysis()
        return analysis.temp_size_in_bytes, sum(z.nbytes for z in arrays)

    for dtype in ("float32", "bfloat16"):
        half, _ = temporary(4096, dtype)
        whole, inputs = temporary(8192, dtype)
        assert whole < 8 * inputs
        assert whole < 2.1 * half


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": jnp.zeros(3)}, r"A has shape \(3,\); it must be \(4,\)"),
        ({"C": jnp.zeros((2, 100, 1, 16))}, r"C has shape \(2, 100, 1, 16\)"),
        (
            {"B": jnp.zeros((2, 100, 3, 16)), "C": jnp.zeros((2, 100, 3, 16))},
            "multiple of groups=3",
        ),
        ({"x": jnp.zeros((2, 100, 4, 8), jnp.bfloat16)}, "share one floating dtype"),
        ({"impl": "cuda"}, "impl='cuda' must be one of 'auto'"),
    ],
)
def test_wrong_arguments_name_themselves(change, message):
    arguments = dict(zip(NAMES, make("float32"))) | change
    arrays = [arguments.pop(name) for name in ("x", "dt", "A", "B", "C")]
    with pytest.raises(ValueError, match=message):
        ssd(*arrays, **arguments)
