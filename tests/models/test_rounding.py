import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.models import FUSIONS, rounding
from tests.models.small_models import jit, random_tokens, small_model


def blocks_of(model_params):
    return [model_params[f"blocks_{layer}"] for layer in range(2)]


def model_with_heads(fusion, **changes):
    """A small model of two blocks whose fusions decide something: heads start at zero."""
    given = {"fusion": fusion, "layers": 2, "impl": "chunked"} | changes
    model, params = small_model("gf", **given)[:2]
    draw = lambda path, leaf: (
        jax.random.normal(jax.random.key(len(leaf)), leaf.shape)
        if path[-1].key == "head_kernel"
        else leaf
    )
    return model, jax.tree_util.tree_map_with_path(draw, params)


# What products alone read of a fusion's parameters.
OF_FUSIONS = {
    "gf": (),
    "mingru": ("candidate_kernel", "update_kernel"),
    "pscan": ("decay_kernel", "input_kernel", "output_kernel"),
    "glu": ("rwkv_kernel", "mamba_kernel", "output_kernel"),
    "linrec": (),
}
# Of which the difference of both columns is read.
HEADS = {fusion: ("head_kernel",) for fusion in ("mingru", "pscan", "glu", "linrec")}


def one_by_one(blocks, fusion="gf"):
    """Each weight rounded, and each difference taken, by itself."""

    def rounded(path, leaf):
        names = [entry.key for entry in path[1:]]
        if "fusion" in names and names[-1] in HEADS.get(fusion, ()):
            return jnp.stack([leaf[:, 0] - leaf[:, 1], jnp.zeros(len(leaf))], axis=1)
        weights = ("kernel", "time_maa_w1", "time_decay_w1", "time_decay_w2")
        weights = OF_FUSIONS[fusion] if "fusion" in names else weights
        return leaf.astype(jnp.bfloat16) if names[-1] in weights and leaf.ndim == 2 else leaf

    return jax.tree_util.tree_map_with_path(rounded, blocks)


def rounded_together(blocks, fusion):
    kinds = ("only_in_products", "only_in_differences")
    of_fusion = (getattr(FUSIONS[fusion], kind, ()) for kind in kinds)
    return rounding.rounded_together(blocks, "bfloat16", *of_fusion)


@pytest.mark.parametrize("fusion", OF_FUSIONS)
def test_weights_and_their_gradients_are_those_of_rounding_one_by_one(monkeypatch, fusion):
    monkeypatch.setattr(rounding, "_MOST", 7)  # several vectors, the last one not full
    params = blocks_of(model_with_heads(fusion)[1])

    def loss(rounded, params):
        leaves = jax.tree.leaves(rounded(params))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves)

    together = functools.partial(rounded_together, fusion=fusion)
    jax.tree.map(np.testing.assert_array_equal, jit(together)(params), one_by_one(params, fusion))
    apart = functools.partial(one_by_one, fusion=fusion)
    found, expected = (jit(jax.grad(functools.partial(loss, f)))(params) for f in (together, apart))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("fusion", OF_FUSIONS)
def test_a_model_computes_the_same_loss_with_weights_rounded_together(fusion):
    model, params = model_with_heads(fusion, dtype="bfloat16")
    blocks = rounded_together(blocks_of(params), fusion)
    rounded = params | {f"blocks_{layer}": block for layer, block in enumerate(blocks)}
    tokens = random_tokens(2, 9)
    logits = [jit(model.apply)({"params": p}, tokens).logits for p in (params, rounded)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_side_by_side_and_their_gradients_are_those_of_rounding_one_by_one(dtype):
    kernels = tuple(jax.random.normal(jax.random.key(0), (3, 4, 6)))
    one_by_one = lambda kernels, dtype: jnp.concatenate([k.astype(dtype) for k in kernels], axis=1)
    x, g = jax.random.normal(jax.random.key(1), (2, 5, 18)).astype(dtype)

    def run(join, kernels):
        joined, pull_back = jax.vjp(lambda z: x[:, :4] @ join(z, dtype), kernels)
        return join(kernels, dtype), joined, *pull_back(g)

    found, expected = (
        jit(functools.partial(run, join))(kernels) for join in (rounding.side_by_side, one_by_one)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [z.dtype for z in jax.tree.leaves(found)] == [z.dtype for z in jax.tree.leaves(expected)]


def test_weights_side_by_side_are_one_matrix_that_no_product_joins():
    kernels = [jnp.ones((4, 6))] * 2
    join = functools.partial(rounding.side_by_side, dtype="bfloat16")
    text = jit(lambda x, *k: x @ join(k)).lower(jnp.ones((3, 4), "bfloat16"), *kernels).as_text()
    (barrier,) = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert "4x12xbf16" in barrier


def test_weights_rounded_together_lie_side_by_side_already():
    """Nothing but the rounding stands behind a barrier, so that XLA finds the matrix it wrote."""
    kernels = {"candidate_kernel": jnp.ones((4, 6)), "update_kernel": jnp.ones((4, 6))}

    def product(x, kernels):
        (block,) = rounded_together([{"fusion": kernels}], "mingru")
        return x @ rounding.side_by_side(list(block["fusion"].values()), "bfloat16")

    text = jit(product).lower(jnp.ones((3, 4), "bfloat16"), kernels).as_text()
    (barrier,) = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert "48xbf16" in barrier


def test_a_fusion_that_says_nothing_is_given_its_parameters_as_they_are():
    """One that a user adds may read what has these names in float32, in any shapes."""
    shapes = {"output_kernel": (4, 4), "rwkv_kernel": (4, 8), "mamba_kernel": (4, 4)}
    shapes["head_kernel"] = (4, 2)
    fusion = {name: jnp.full(shape, 1 / 3) for name, shape in shapes.items()}
    blocks = [{"fusion": fusion, "out": {"kernel": jnp.full((4, 4), 1 / 3)}}]
    (found,) = rounding.rounded_together(blocks, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found["fusion"], fusion)
    assert found["out"]["kernel"].dtype == jnp.bfloat16
