import functools

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.models import rounding
from tests.models.small_models import jit, random_tokens, small_model


def blocks_of(model_params):
    return [model_params[f"blocks_{layer}"] for layer in range(2)]


def one_by_one(blocks):
    """Each weight rounded by itself."""

    def rounded(path, leaf):
        names = [entry.key for entry in path[1:]]
        vector_or_plain = leaf.ndim != 2 or "fusion" in names
        is_weight = names[-1] in ("kernel", "time_maa_w1", "time_decay_w1", "time_decay_w2")
        return leaf.astype(jnp.bfloat16) if is_weight and not vector_or_plain else leaf

    return jax.tree_util.tree_map_with_path(rounded, blocks)


def test_weights_and_their_gradients_are_those_of_rounding_one_by_one(monkeypatch):
    monkeypatch.setattr(rounding, "_MOST", 7)  # several vectors, the last one not full
    params = blocks_of(small_model("gf", layers=2, impl="chunked")[1])

    def loss(rounded, params):
        leaves = jax.tree.leaves(rounded(params))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves)

    together = functools.partial(rounding.rounded_together, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, jit(together)(params), one_by_one(params))
    found, expected = (
        jit(jax.grad(functools.partial(loss, f)))(params) for f in (together, one_by_one)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_a_model_computes_the_same_loss_with_weights_rounded_together():
    model, params = small_model("gf", layers=2, impl="chunked", dtype="bfloat16")[:2]
    blocks = rounding.rounded_together(blocks_of(params), "bfloat16")
    rounded = params | {f"blocks_{layer}": block for layer, block in enumerate(blocks)}
    tokens = random_tokens(2, 9)
    logits = [jit(model.apply)({"params": p}, tokens).logits for p in (params, rounded)]
    np.testing.assert_array_equal(*logits)
