import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gt_jax.models import cross_entropy
from gt_jax.models.cross_entropy import head_cross_entropy
from tests.models.small_models import jit, random_tokens, small_model

N, D, V = 22, 8, 13


def inputs(dtype=np.float64, tokens=N, vocabulary=V):
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((tokens, D)), rng.standard_normal((D, vocabulary))
    targets = rng.integers(vocabulary, size=tokens)
    targets[::5] = -1
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets)


def of_logits(x, head, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ head, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=targets >= 0)


@pytest.mark.parametrize("logits_at_once", [2**26, 7 * V, 1])
def test_chunks_give_the_loss_and_gradients_of_all_logits(monkeypatch, logits_at_once):
    """Also where the last chunk is not full, and under vmap."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", logits_at_once)
    with jax.enable_x64(True):
        x, head, targets = inputs()
        heads = jnp.stack([head, 2 * head])

        @jit  # anew for every size of a chunk
        def chunked(x, heads):
            both = jax.value_and_grad(lambda *a: head_cross_entropy(*a, targets) / 7, (0, 1))
            mapped = jax.vmap(lambda head: jax.grad(head_cross_entropy, 1)(x, head, targets))
            return both(x, heads[0]), head_cross_entropy(x, heads[0], targets), mapped(heads)

        both, alone, mapped = chunked(x, heads)
        expected = jit(jax.value_and_grad(lambda *a: of_logits(*a, targets) / 7, (0, 1)))(x, head)
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        jax.tree.map(same, both, expected)
        np.testing.assert_allclose(alone / 7, expected[0], rtol=1e-12)
        same(mapped[0], 7 * expected[1][1])


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK", 64 * V)
    arrays = inputs(np.float32, tokens=1024)
    text = jax.jit(jax.grad(head_cross_entropy, (0, 1))).lower(*arrays).as_text()
    assert f"64x{V}xf32" in text
    assert f"1024x{V}x" not in text and f"16x64x{V}x" not in text


def test_bfloat16_loss_is_as_near_to_float64_as_with_float32_products():
    """The head's forward operands are bfloat16 either way: only gradients could lose anything.

    Compared with what a GPU does to a float32 product, rounding to TF32, the gradients of bfloat16
    operands are off by at most half as much again, measured against float64 of unrounded inputs.
    """

    def error(found, exact):
        return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)

    def tf32(x):
        return jax.lax.reduce_precision(x, 8, 10)

    with jax.enable_x64(True):
        x, head, targets = inputs(tokens=400, vocabulary=200)
        x = 2 * x
        exact, (dx, d_head) = jit(jax.value_and_grad(of_logits, (0, 1)))(x, head, targets)
    half, wide = x.astype(jnp.bfloat16), head.astype(jnp.float32)
    # Bfloat16 is then rounded where the program says so.
    exactly = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    nats, found = exactly(jax.value_and_grad(head_cross_entropy, (0, 1)))(half, wide, targets)

    rounded = wide.astype(jnp.bfloat16).astype(jnp.float32)
    logits = half.astype(jnp.float32) @ rounded
    nats_before, d_logits = jit(
        jax.value_and_grad(lambda logits: of_logits(logits, jnp.eye(200), targets))
    )(logits)
    before = (tf32(d_logits) @ rounded.T, half.astype(jnp.float32).T @ tf32(d_logits))
    assert abs(nats - exact) <= abs(nats_before - exact) + 1e-6 * exact
    before = (before[0].astype(jnp.bfloat16), before[1])
    for new, old, true in zip(found, before, (dx, d_head)):
        assert error(new, true) < 1.5 * error(old, true) < 0.03
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32


def test_loss_of_a_model_is_the_cross_entropy_of_its_logits():
    small = small_model("gf")
    tokens = random_tokens(2, 9)
    targets = jnp.where(jnp.arange(9) == 3, -1, jnp.roll(tokens, -1, axis=1))
    measure = jit(functools.partial(small.model.apply, method="loss"))
    loss = measure({"params": small.params}, tokens, targets)
    output = small.apply({"params": small.params}, tokens)
    expected = of_logits(output.logits.reshape(-1, 17), jnp.eye(17), targets.ravel())
    np.testing.assert_allclose(loss.nats, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        loss.state,
        output.state,
    )


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 5), (1, 1), (1, 7), (3, 1)])
@pytest.mark.parametrize("counted", [True, False])
def test_few_tokens_a_vocabulary_of_one_and_nothing_that_counts(tokens, vocabulary, counted):
    x, head, _ = inputs(np.float32, tokens, vocabulary)
    targets = jnp.full(tokens, 0 if counted else -1)
    found, wanted = (
        jit(jax.value_and_grad(f, (0, 1)))(x, head, targets)
        for f in (head_cross_entropy, of_logits)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)


@pytest.mark.parametrize("logits_at_once", [2**26, 4 * V])
def test_id_outside_the_vocabulary_is_nan_and_never_a_loss(monkeypatch, logits_at_once):
    monkeypatch.setattr(cross_entropy, "_CHUNK", logits_at_once)
    x, head, targets = inputs(np.float32)
    outside = targets.at[N // 2].set(V)

    @jit
    def losses(targets):
        alone = head_cross_entropy(x, head, targets)
        return alone, jax.value_and_grad(head_cross_entropy)(x, head, targets)[0]

    assert np.isfinite(losses(targets)).all()
    assert np.isnan(losses(outside)).all()
