"""Claims about time that hold for every architecture: state, steps, causality, documents.

Lengths are few and shared, because compilation is what these tests cost.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small_models import jit, random_tokens, small_model

T, PART = 21, 7
# Float32 rounding through two blocks, whose logits are of order one to ten.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found, expected)


def in_chunks(small, tokens, state, length):
    """Logits and last state of the tokens given `length` at a time, from a state on."""
    logits = []
    for start in range(0, tokens.shape[1], length):
        output = small.apply({"params": small.params}, tokens[:, start : start + length], state)
        logits.append(output.logits)
        state = output.state
    return jnp.concatenate(logits, axis=1), state


def test_state_carries_over_splits(small):
    """And no state is the zero state of `init_state`."""
    tokens = random_tokens(2, T)
    whole = small.apply({"params": small.params}, tokens)
    same(in_chunks(small, tokens, small.model.init_state(2), PART), tuple(whole))


def test_steps_equal_the_whole(small):
    tokens = random_tokens(2, T)
    whole = small.apply({"params": small.params}, tokens)
    same(in_chunks(small, tokens, small.model.init_state(2), 1), tuple(whole))


def test_initial_state_describes_every_state(small):
    state = small.model.init_state(2)
    after = jax.eval_shape(small.apply, {"params": small.params}, random_tokens(2, T)).state
    described = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), after)
    assert all(leaf.shape[0] == 2 and not leaf.any() for leaf in jax.tree.leaves(state))


def test_packed_documents_equal_separate_ones(small):
    """Documents of 1 to 9 tokens, ids that return, another layout in the second row."""
    tokens = random_tokens(2, T)
    ids = [[7] * 6 + [3] + [7] * 2 + [1] * 9 + [0] * 3, [5] * 2 + [6] * 18 + [4]]
    zeros = small.model.init_state(2)
    _, before = in_chunks(small, random_tokens(2, PART, seed=3), zeros, PART)
    packed = small.apply({"params": small.params}, tokens, before, segment_ids=jnp.array(ids))

    for row in range(2):
        starts = np.flatnonzero(np.diff(ids[row])) + 1
        state, bounds = before, [0, *starts, T]
        for start, end in pairwise(bounds):
            logits, state = in_chunks(small, tokens[:, start:end], state, 1)
            same(packed.logits[row, start:end], logits[row])
            last, state = state, zeros
        more = random_tokens(2, PART, seed=4)
        continued, _ = in_chunks(small, more, packed.state, PART)
        expected, _ = in_chunks(small, more, last, PART)
        same(continued[row], expected[row])


def test_later_tokens_change_nothing_before_them(small):
    tokens = random_tokens(2, T)
    changed = tokens.at[:, 11:].set((tokens[:, 11:] + 5) % 17)
    before, after = (small.apply({"params": small.params}, x).logits for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (np.abs(before[:, 11:] - after[:, 11:]).max(-1) > 0).all()


@pytest.mark.parametrize("kind", ["gf", "gru", "legacy-b2", "rwkv6", "mamba2", "gpt2"])
def test_gradient_is_causal(kind):
    """Token t's logits depend on the embeddings up to t, and on every one of them."""
    model, params, _ = small_model(kind, layers=1, tie_embeddings=False)
    tokens = jnp.arange(10)[None]  # all distinct, so an embedding row is a position

    def logit_at(params, t):
        return jnp.sum(model.apply({"params": params}, tokens).logits[0, t] ** 2)

    gradient = jit(jax.grad(logit_at))
    for t in (0, 5, 9):
        size = np.abs(gradient(params, t)["embedding"]["embedding"]).sum(-1)
        assert (size[: t + 1] > 0).all()
        assert (size[t + 1 :] == 0).all()
