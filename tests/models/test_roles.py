"""Segment embeddings: the control token before a token decides, over chunks and documents."""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from gt_jax.models import count_parameters, make_model
from gt_jax.models.roles import RoleState, roles
from gt_jax.training.optimizer import is_decayed, label
from tests.models.small_models import jit, random_tokens, small_config, small_model

FIRST = 8
TOKENS = np.array([[1, 8, 2, 2, 10, 2, 2, 9], [2, 9, 9, 2, 2, 8, 2, 10]], np.int32)
IDS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 3, 3, 3, 3]], np.int32)


def test_roles_last_until_the_next_control_token():
    found, after = roles(TOKENS, FIRST)
    assert found.tolist() == [[0, 1, 1, 1, 3, 3, 3, 2], [0, 2, 2, 2, 2, 1, 1, 3]]
    assert after.role.tolist() == [2, 3]


def test_a_document_starts_without_a_role_and_the_first_one_continues():
    found, _ = roles(TOKENS, FIRST, RoleState(jnp.array([3, 0])), IDS)
    assert found.tolist() == [[3, 1, 1, 1, 3, 0, 0, 2], [0, 2, 2, 2, 0, 1, 1, 3]]


def test_model_adds_the_vector_of_the_role_and_carries_it():
    """Against a model with every sum of both as a token of its own; three tokens at a time."""
    small = small_model("gf", layers=1, segment_token=FIRST, tie_embeddings=False)
    tokens = (random_tokens(2, 9) % FIRST).at[:, 1].set(jnp.array([10, 8]))
    logits, state = [], small.model.init_state(2)
    for start in range(0, 9, 3):
        output = small.apply({"params": small.params}, tokens[:, start : start + 3], state)
        logits.append(output.logits)
        state = output.state
    assert state[1].role.tolist() == [3, 1]

    params = dict(small.params)
    vectors, table = params.pop("segment_embedding"), params["embedding"]["embedding"]
    sums = [table, *(table + vector for vector in vectors)]
    params |= {"embedding": {"embedding": jnp.concatenate(sums)}}
    params |= {"head": jnp.tile(params["head"], 4)}
    plain = make_model(small_config(layers=1, vocab_size=4 * 17, tie_embeddings=False))
    in_role = tokens.at[:, 1:].add(17 * jnp.array([[3], [1]]))
    want = jit(plain.apply)({"params": params}, in_role).logits[..., :17]
    assert_allclose(jnp.concatenate(logits, axis=1), want, rtol=2e-4, atol=2e-4)


def test_vectors_start_at_zero_are_counted_and_not_decayed():
    config = small_config(segment_token=FIRST)
    assert count_parameters(config)["segment_embedding"] == 3 * 32
    path = (type("Key", (), {"key": "segment_embedding"})(),)
    assert label(path) == "rest" and not is_decayed(path, np.ones((3, 32)))
