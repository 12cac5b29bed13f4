"""Claims about time that hold for every architecture: state, steps, causality, documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small_models import KINDS, random_tokens, small_model

# Float32 rounding through two blocks, whose logits are of order one to ten.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def same(found, expected):
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def same_state(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found, expected)


def test_state_carries_over_a_split(small):
    tokens = random_tokens(2, 21)
    variables = {"params": small.params}
    whole = small.apply(variables, tokens)
    first = small.apply(variables, tokens[:, :8])
    second = small.apply(variables, tokens[:, 8:], first.state)
    same(jnp.concatenate([first.logits, second.logits], axis=1), whole.logits)
    if not small.model.config.architecture.startswith("gpt"):  # whose caches round differently
        same_state(second.state, whole.state)


def test_steps_equal_the_whole(small):
    tokens = random_tokens(2, 12)
    variables = {"params": small.params}
    whole = small.apply(variables, tokens)
    state, logits = small.model.init_state(2), []
    for t in range(12):
        output = small.apply(variables, tokens[:, t : t + 1], state)
        state = output.state
        logits.append(output.logits)
    same(jnp.concatenate(logits, axis=1), whole.logits)
    same_state(state, whole.state)


def test_initial_state_is_no_state(small):
    tokens = random_tokens(2, 9)
    state = small.model.init_state(2)
    given = small.apply({"params": small.params}, tokens, state)
    none = small.apply({"params": small.params}, tokens)
    same(given.logits, none.logits)
    same_state(given.state, none.state)
    described = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), none.state)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))


def test_packed_documents_equal_separate_ones(small):
    """Ids may repeat later in the row; documents of 1, 2, 9 and 5 tokens, then one goes on."""
    variables = {"params": small.params}
    tokens = random_tokens(1, 25)
    ids = jnp.array([[7] * 6 + [3] + [7] * 2 + [1] * 9 + [0] * 7])
    bounds = [0, 6, 7, 9, 18, 25]
    before = small.apply(variables, random_tokens(1, 8, seed=3)).state  # of the first document

    packed = small.apply(variables, tokens, before, segment_ids=ids)
    states, logits = [before] + [None] * 4, []
    for state, start, end in zip(states, bounds[:-1], bounds[1:], strict=True):
        output = small.apply(variables, tokens[:, start:end], state)
        logits.append(output.logits)
    same(packed.logits, jnp.concatenate(logits, axis=1))

    more = random_tokens(1, 8, seed=4)
    same(
        small.apply(variables, more, packed.state).logits,
        small.apply(variables, more, output.state).logits,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_causal(kind):
    """Token t's logits depend on the embeddings up to t, and on every one of them."""
    model, params, _ = small_model(kind, tie_embeddings=False)
    tokens = jnp.arange(10)[None]  # all distinct, so an embedding row is a position

    def logit_at(params, t):
        return jnp.sum(model.apply({"params": params}, tokens).logits[0, t] ** 2)

    gradient = jax.jit(jax.grad(logit_at))
    for t in (0, 5, 9):
        size = np.abs(gradient(params, t)["embedding"]["embedding"]).sum(-1)
        assert (size[: t + 1] > 0).all()
        assert (size[t + 1 :] == 0).all()


def test_later_tokens_change_nothing_before_them(small):
    tokens = random_tokens(1, 16)
    changed = tokens.at[:, 11:].set((tokens[:, 11:] + 5) % 17)
    before, after = (small.apply({"params": small.params}, x).logits for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (np.abs(before[:, 11:] - after[:, 11:]).max(-1) > 0).all()
