"""All kernels element by element on a GPU: right beside float64 at sizes that cut their work, the
same bits twice. The interpreter, which the other tests of this folder run them in, has other code
for rows of threads, copies and products of warps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import softmax_loss
from gt_jax.kernels.pallas import devices
from tests.kernels.elementwise import (
    test_gated,
    test_gated_branches,
    test_projected,
    test_residual_norm,
    test_softmax_loss,
    test_token_shift,
)

pytestmark = pytest.mark.gpu

TOKENS = (7, 200)  # not as many as any block walks


@pytest.fixture(autouse=True)
def needs_gpu():
    if reason := devices.portable_unsupported():
        pytest.skip(reason)


def assert_right(fused, straight, arguments, cotangents, with_gradients):
    """Of a function and formulas in float64: values and gradients, in a few roundings."""
    run = lambda: jax.tree.leaves(with_gradients(fused, arguments, cotangents))
    ours, again = run(), run()
    wide = jax.tree.map(lambda z: z.astype(jnp.float64), (arguments, cotangents))
    exact = jax.tree.leaves(with_gradients(straight, *wide))
    size, rms = 0.0, lambda z: np.sqrt(np.mean(np.square(np.asarray(z, np.float64))))
    for z, repeated, expected in zip(ours, again, exact, strict=True):
        np.testing.assert_array_equal(z, repeated)
        # Two numbers are the gradient of a bias: it may cancel, of terms like those before.
        size = rms(expected) if expected.size > 2 else max(size, rms(expected))
        bound = 3e-3 if z.dtype == jnp.bfloat16 else 5e-6  # of rounding to 8 or 24 bits
        assert rms(np.asarray(z, np.float64) - np.asarray(expected)) <= bound * size


@pytest.mark.parametrize("name", test_gated_branches.FUNCTIONS)
def test_branches_match_straight_formulas(name):
    case = test_gated_branches.case(name, TOKENS)
    functions = test_gated_branches.FUNCTIONS[name]
    assert_right(*functions, *case, test_gated_branches.with_gradients)


@pytest.mark.parametrize("branch", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", test_residual_norm.FUNCTIONS)
def test_stream_matches_straight_formulas(name, branch):
    if branch == "float32" and name in ("gated", "blended"):
        pytest.skip("branches that are weighted are bfloat16")
    case = test_residual_norm.case(name, branch, TOKENS)
    functions = test_residual_norm.FUNCTIONS[name]
    assert_right(*functions, *case, test_residual_norm.with_gradients)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((4, 512, 768), {"documents": True, "last": True}),
        ((3, 192, 128), {"documents": True}),
        ((2, 64, 64), {"last": True}),
    ],
    ids=str,
)
def test_blends_match_the_plain_form(shape, options):
    inputs = test_token_shift.make_blends(*shape, **options)
    keys = jax.random.split(jax.random.key(1), test_token_shift.BLENDS)
    cotangents = [jax.random.normal(k, inputs[0].shape, jnp.bfloat16) for k in keys]
    run = lambda f, *z: test_token_shift.values_and_gradients(f, *z)
    ours = run(test_token_shift.token_shift.blends, inputs, cotangents)
    again = run(test_token_shift.token_shift.blends, inputs, cotangents)
    as_float64 = test_token_shift.as_float64
    exact = run(test_token_shift.plain_blends, as_float64(inputs), as_float64(cotangents))
    for z, repeated in zip(ours, again, strict=True):
        np.testing.assert_array_equal(z, repeated)
    test_token_shift.assert_close(ours, exact)


def test_head_norm_matches_the_plain_form():
    inputs = test_token_shift.make_norm(4, 512, 12, 64)
    cotangent = jax.random.normal(jax.random.key(1), inputs[1].shape, jnp.bfloat16)
    run = lambda f, *z: test_token_shift.values_and_gradients(f, *z)
    ours = run(test_token_shift.fused_norm, inputs, cotangent)
    wide = map(test_token_shift.as_float64, (inputs, cotangent))
    test_token_shift.assert_close(ours, run(test_token_shift.plain_norm, *wide))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_convolution_and_gated_norm_match_straight_formulas(packed):
    tokens = (4, 512)  # in the interpreter rows of threads are fewer, and fewer tokens do
    documents = np.random.default_rng(1).random(tokens) < 0.05
    case = test_gated.make_case(*tokens)
    test_gated.assert_matches(*case, documents.cumsum(1) if packed else None)


@pytest.mark.parametrize("name", test_projected.NORMS)
def test_norms_before_a_product_are_those_of_two_steps(name):
    test_projected.assert_as_in_two_steps(name, same_bits=False)


def test_gelu_and_its_slope_are_right_to_their_rounding():
    test_projected.assert_gelu_is_right()


@pytest.mark.parametrize("vocabulary", [512, 16384])
def test_cross_entropy_matches_float64(vocabulary):
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((300, vocabulary))
    logits[1] += 1e4  # overflows without its maximum
    targets = rng.integers(vocabulary, size=300)
    targets[2], targets[3], targets[4] = -1, 0, vocabulary - 1
    logits, targets = jnp.asarray(logits, jnp.float32), jnp.asarray(targets)
    nats, gradients = jax.jit(softmax_loss.nats_and_gradients)(logits, targets)
    again = jax.jit(softmax_loss.nats_and_gradients)(logits, targets)
    expected_nats, expected = test_softmax_loss.exact(logits, targets)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6, atol=4e-6)
    wide = np.asarray(gradients, np.float64)
    np.testing.assert_allclose(wide, expected, rtol=2**-7, atol=1e-8)
    np.testing.assert_array_equal(nats, again[0])
    np.testing.assert_array_equal(gradients, again[1])
