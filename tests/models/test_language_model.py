"""What holds around the blocks: types, remat, activations, branch dropout, gradients, init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.testing import assert_allclose

from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.models.hybrid import drop_branch
from tests.models.small_models import KINDS, jit, random_tokens, small_config, small_model

T = 21


def initialise(model):
    return jit(model.init)(jax.random.key(0), random_tokens(1, 2))["params"]


def cross_entropy(model, params, tokens):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]).logits)
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("kind", ["gf", "legacy-a", "rwkv6", "mamba2", "gpt2"])
def test_bfloat16_stays_near_float32(kind):
    """bfloat16 keeps 8 bits: two blocks of lively parameters lose under 5 % of the logits' size."""
    full, half = small_model(kind), small_model(kind, dtype="bfloat16")
    tokens = random_tokens(2, T)
    expected = full.apply({"params": full.params}, tokens).logits
    found = half.apply({"params": half.params}, tokens).logits
    assert found.dtype == jnp.float32
    assert jnp.std(found - expected) < 0.05 * jnp.std(expected)


@pytest.mark.parametrize(
    "kind, without",
    [
        ("gf", ()),
        ("gru", ()),
        ("rwkv+rwkv", ()),
        ("mamba+mamba", ()),
        ("legacy-a", ()),
        ("legacy-b2", ("time_first",)),  # cancels but for an epsilon
        ("rwkv6", ()),
        ("mamba2", ()),
        ("gpt2", ()),
    ],
)
def test_every_parameter_gets_a_gradient(kind, without):
    """From the official init, whose zeros open up one after the other over a few sign steps."""
    model = make_model(small_config(**KINDS[kind], layers=1))
    params, tokens = initialise(model), random_tokens(2, T)

    @jit
    def step(params):
        gradient = jax.grad(lambda params: cross_entropy(model, params, tokens))(params)
        return gradient, jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient)

    for _ in range(4):
        gradient, params = step(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        if path[-1].key not in without:
            assert np.any(leaf != 0), path


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_gradients_nor_activations(remat):
    plain, remat = small_model("gf", layers=1), small_model("gf", layers=1, remat=remat)
    tokens = random_tokens(2, T)

    def gradient_and_activations(small):
        def loss(params):
            output, sown = small.model.apply({"params": params}, tokens, mutable=["activations"])
            return jnp.mean(output.logits**2), sown

        return jit(jax.grad(loss, has_aux=True))(small.params)

    expected, found = gradient_and_activations(plain), gradient_and_activations(remat)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    sown = found[1]["activations"]["blocks_0"]
    for name in ("rwkv_out", "mamba_out", "fused"):
        assert sown[name][0].shape == (2, T, 32)
    assert sown["fusion"]["gate"][0].shape == (2, T, 1)


@pytest.mark.parametrize("kind", ["gf", "legacy-c", "rwkv6", "rwkv6-legacy", "gpt2"])
def test_blocks_without_feed_forward_are_those_whose_feed_forward_adds_nothing(kind):
    whole, bare = small_model(kind), small_model(kind, feed_forward=False)
    tokens = random_tokens(2, T)

    params = flatten_dict(whole.params)
    for path, leaf in params.items():
        if path[1:] in (("ffn", "down", "kernel"), ("ffn", "value", "kernel")):
            params[path] = 0 * leaf
    kept = flatten_dict(bare.params)
    parts = {path: path[1] if len(path) > 1 else path[0] for path in params}
    assert set(kept) == {path for path in params if not parts[path].startswith("ffn")}
    bare_params = unflatten_dict({path: params[path] for path in kept})
    expected = whole.apply({"params": unflatten_dict(params)}, tokens).logits
    output = bare.apply({"params": bare_params}, tokens)
    assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-5)
    state = bare.model.init_state(2)
    assert jax.tree.structure(state) == jax.tree.structure(output.state)
    for start in range(0, T, T // 3):
        third = slice(start, start + T // 3)
        logits, state = bare.apply({"params": bare_params}, tokens[:, third], state)
        assert_allclose(logits, expected[:, third], rtol=1e-4, atol=1e-4)


def test_init_returns_parameters_only():
    model = small_model("gf").model
    assert set(jax.eval_shape(model.init, jax.random.key(0), random_tokens(1, 2))) == {"params"}


def test_dropped_branch_is_zero_and_a_kept_one_keeps_the_mean():
    branch = jnp.ones((2, 3, 4))
    drawn = np.array([drop_branch(branch, 0.25, jax.random.key(i)) for i in range(200)])
    assert set(np.unique(drawn.round(4))) == {0, np.float32(1.3333)}
    assert (drawn.reshape(200, -1).std(axis=1) == 0).all()  # one draw for the whole batch
    assert abs(drawn.mean() - 1) < 0.1
    assert not drop_branch(branch, 1.0, jax.random.key(0)).any()
    assert_allclose(drop_branch(branch, 0.0, jax.random.key(0)), branch)


def test_branch_dropout_acts_in_every_block():
    model, params, _ = small_model("gf")
    tokens = random_tokens(1, T)

    @jit
    def apply(probability, key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, tokens, rwkv_drop=probability, rngs=rngs).logits

    never, always = apply(0.0, jax.random.key(0)), apply(1.0, jax.random.key(0))
    whole = small_model("gf").apply({"params": params}, tokens).logits
    assert_allclose(never, whole, rtol=1e-5, atol=1e-5)
    assert np.isfinite(always).all() and np.abs(always - whole).max() > 0.1
    seen = {float(apply(0.5, jax.random.key(i))[0, -1, 0]) for i in range(24)}
    assert len(seen) == 4  # two blocks, each on or off


def test_branch_dropout_of_a_model_without_branches_is_an_error():
    model, params, _ = small_model("gpt2")
    with pytest.raises(
        InputError, match=r"train\.rwkv_dropout_start .* need model.architecture='hybrid'"
    ):
        model.apply({"params": params}, random_tokens(1, 3), rwkv_drop=0.1)


def test_normal_initialisation_draws_every_kernel_alike():
    for kind in ("gf", "legacy-a"):
        params = initialise(make_model(small_config(**KINDS[kind], layers=1, init="normal")))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if path[-1].key == "kernel" and path[-2].key != "fusion":
                assert_allclose(leaf.std(), 0.02, rtol=0.15, err_msg=str(path))
        assert_allclose(params["embedding"]["embedding"].std(), 0.02, rtol=0.1)


def test_logits_start_with_unit_variance():
    model = make_model(small_config(layers=1, dim=64, vocab_size=256))
    params = initialise(model)
    assert_allclose(params["embedding"]["embedding"].std(), 64**-0.5, rtol=0.05)
    logits = jit(model.apply)({"params": params}, jnp.arange(64)[None]).logits
    assert_allclose(logits.std(), 1, rtol=0.1)


def test_blinkdl_initialisation_starts_every_block_as_the_identity():
    tokens = random_tokens(1, 9)
    for kind in ("gf", "rwkv6-legacy", "gpt1"):
        model = make_model(small_config(**KINDS[kind], layers=1, init="blinkdl"))
        params = initialise(model)
        assert np.abs(params["embedding"]["embedding"]).max() <= 1e-4
        block = params["blocks_0"]
        assert not block["ffn"]["down"]["kernel"].any()
        if kind == "gpt1":
            assert not block["attention"]["output"]["kernel"].any()
        else:
            assert not block["rwkv"]["output"]["kernel"].any()
        assert np.isfinite(jit(model.apply)({"params": params}, tokens).logits).all()
