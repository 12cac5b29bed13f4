"""What survives of a state: a share of RWKV's past a document, Mamba's while a topic lasts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.analysis import memories
from gt_jax.models import carry
from gt_jax.models.carry import TopicState, reset_at, start_documents
from tests.models.small_models import jit, random_tokens, small_model

IDS = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)


def read(small, tokens, state=None, **options):
    return small.apply({"params": small.params}, tokens, state, **options)


@pytest.fixture(scope="module")
def kept():
    return small_model("gf", layers=1, rwkv_carry=0.5)


def test_a_document_decays_the_rwkv_state_and_resets_all_else(kept):
    """Packed or by rows that start anew: as if the state were halved by hand in between."""
    tokens = random_tokens(2, 7)
    packed = read(kept, tokens, segment_ids=IDS)
    first = read(kept, tokens[:, :3])
    state = start_documents(kept.model.config, kept.params, first.state, jnp.array([True, True]))
    (before,), (after,) = first.state, state
    assert_allclose(after.rwkv.wkv, 0.5 * before.rwkv.wkv)
    assert np.abs(after.rwkv.wkv).max() > 0 and not after.rwkv.last.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(after.mamba))
    second = read(kept, tokens[:, 3:], state)
    assert_allclose(packed.logits[:, 3:], second.logits, rtol=2e-4, atol=2e-4)
    assert_allclose(packed.state[0].rwkv.wkv, second.state[0].rwkv.wkv, rtol=2e-4, atol=2e-4)
    other = start_documents(kept.model.config, kept.params, first.state, jnp.array([False, True]))
    assert_allclose(other[0].rwkv.wkv[0], before.rwkv.wkv[0])
    assert_allclose(other[0].mamba.ssm[0], before.mamba.ssm[0])


def test_no_share_is_the_zero_state():
    small = small_model("gf", layers=1)
    state = read(small, random_tokens(2, 3)).state
    started = start_documents(small.model.config, small.params, state, jnp.array([True, True]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(started))
    assert start_documents(small.model.config, small.params, None, jnp.array([True])) is None


def texts():
    """n [2, 80, 8]: a topic for 40 tokens, then another; in the second row the same throughout."""
    rng = np.random.default_rng(0)
    topics = np.zeros((2, 80, 8))
    topics[:, :, 0], topics[0, 40:, 0], topics[0, 40:, 1] = 1, 0, 1
    return jnp.asarray(topics + 0.1 * rng.standard_normal(topics.shape), jnp.float32)


def loop(n, threshold):
    """Token by token in float64."""
    fast, slow, above, starts = np.zeros(8), np.zeros(8), False, []
    for x in np.float64(n):
        fast, slow = fast * 15 / 16 + x / 16, slow * 255 / 256 + x / 256
        was = above
        above = 1 - fast @ slow / np.linalg.norm(fast) / np.linalg.norm(slow) > threshold
        starts.append(above and not was)
    return starts


def test_topic_shifts_are_those_of_the_loop_and_of_every_split():
    n = texts()
    topic_shifts = jit(functools.partial(carry.topic_shifts, threshold=0.1))
    shifts, after = topic_shifts(n, None, None)
    assert shifts.tolist() == [loop(row, 0.1) for row in n]
    assert shifts[0].sum() == 1 and shifts[0, 40:60].any() and not shifts[1].any()
    early, state = topic_shifts(n[:, :45], None, None)
    late, state = topic_shifts(n[:, 45:], state, None)
    assert (jnp.concatenate([early, late], axis=1) == shifts).all()
    assert_allclose(state.means, after.means, rtol=1e-5, atol=1e-6)
    ids = jnp.repeat(jnp.array([[0, 1]]), 40, axis=1)
    assert not topic_shifts(n, None, ids)[0].any()  # each document has one topic


def test_a_shift_resets_mamba_at_that_token():
    state = TopicState(jnp.ones((2, 4)), jnp.ones(2))  # any pytree of rows
    starts = jnp.array([[True, False, False], [False, True, False]])
    state, ids = reset_at(starts, state, jnp.array([[5, 5, 5], [5, 5, 5]]))
    assert state.above.tolist() == [0, 1] and not state.means[0].any()
    assert (jnp.diff(ids, axis=1) != 0).tolist() == [[False, False], [True, False]]


def test_a_model_that_resets_mamba_steps_as_it_reads():
    """With a threshold low enough that random text crosses it."""
    small = small_model("gf", layers=1, mamba_reset=0.05)
    assert set(memories(small.model.init_state(1)[0])) == {"rwkv", "mamba"}
    tokens = random_tokens(2, 21)
    whole, never = read(small, tokens), small_model("gf", layers=1)
    plain = jit(never.model.apply)({"params": small.params}, tokens)
    assert np.abs(whole.logits - plain.logits).max() > 1e-2
    logits, state = [], small.model.init_state(2)
    for t in range(21):
        output = read(small, tokens[:, t : t + 1], state)
        logits.append(output.logits)
        state = output.state
    assert_allclose(jnp.concatenate(logits, axis=1), whole.logits, rtol=2e-4, atol=2e-4)
