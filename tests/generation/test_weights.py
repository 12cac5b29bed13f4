"""A step in two parts against the model's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.generation.weights import decode_step, prepare_weights
from gt_jax.models import make_model
from tests.models.small_models import small_model

# Bfloat16 is then rounded where the program says so.
EXACT = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}


@pytest.mark.parametrize("kind", ["gf", "gru", "mamba+mamba", "legacy-b2", "rwkv6", "gpt2"])
def test_two_parts_compute_what_the_model_does(kind):
    small, rows = small_model(kind, dtype="bfloat16"), 2
    whole = jax.jit(small.model.apply, compiler_options=EXACT)
    in_parts = jax.jit(decode_step, static_argnums=0, compiler_options=EXACT)
    weights = prepare_weights(small.model, small.params, rows)
    state = expected_state = small.model.init_state(rows)
    for tokens in jnp.array([[3, 5], [16, 0]]):
        expected = whole({"params": small.params}, tokens[:, None], expected_state)
        expected_state = expected.state
        logits, state = in_parts(small.model, weights, tokens, state)
        jax.tree.map(np.testing.assert_array_equal, state, expected_state)
        # A head's transpose sums in another order.
        np.testing.assert_allclose(logits, expected.logits[:, 0], atol=1e-6 * np.abs(logits).max())


def test_matrices_are_cast_ahead_and_nothing_is_repeated_for_every_row():
    small = small_model("gf", dtype="bfloat16")
    weights = prepare_weights(small.model, small.params, 64)
    float32 = [leaf.shape for leaf in weights if leaf.dtype == jnp.float32 and leaf.ndim == 2]
    vocab, dim = small.params["embedding"]["embedding"].shape
    assert (vocab, dim) in float32  # looked up; the head is another, in bfloat16
    assert (dim, vocab) in {leaf.shape for leaf in weights if leaf.dtype == jnp.bfloat16}
    elements = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    assert sum(leaf.size for leaf in weights) <= elements + vocab * dim


def test_rematerialised_model_is_prepared_alike():
    small = small_model("gf", dtype="bfloat16")
    for remat in ("dots", "full"):
        model = make_model(dataclasses.replace(small.model.config, remat=remat))
        alike = jax.eval_shape(lambda p, m=model: prepare_weights(m, p, 2), small.params)
        plain = jax.eval_shape(lambda p: prepare_weights(small.model, p, 2), small.params)
        assert alike == plain
