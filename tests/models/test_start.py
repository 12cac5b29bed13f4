"""How models start: which outputs are zero, how large gradients are, the original's own inits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from gt_jax.analysis import measure_block
from gt_jax.config import Optim
from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.models.layers import branch_output_init, fan_in_uniform
from gt_jax.training import optimizer
from tests.models.small_models import jit, random_tokens, small_config

HY = {"fusion": "hy"}
STARTS = {
    "gf": {"fusion": "gf"},
    "hy": HY,
    "hy, epsilon 0.01": HY | {"branch_epsilon": 1e-2},
    "parallel, both zero": {"fusion": "parallel", "branch_start": "both"},
}


@functools.cache
def first_steps(name):
    """Measures of every block at step 0; gradient norms by part at steps 0 to 10."""
    model = make_model(small_config(**STARTS[name], gate_init=0.7, heads=1, layers=1))
    tokens = random_tokens(8, 33)
    optim = Optim()
    tx = optimizer.make_optimizer(optim, optimizer.make_schedule(optim, 500))

    def loss(params):
        apply = functools.partial(model.apply, mutable=["activations"])
        output, sown = apply({"params": params}, tokens[:, :-1])
        log_p = jax.nn.log_softmax(output.logits)
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)), sown

    def step(carry, _):
        params, state = carry
        grads, sown = jax.grad(loss, has_aux=True)(params)
        block = sown["activations"]["blocks_0"]
        measured = measure_block(model.config, params["blocks_0"]["fusion"], block)
        grads = optimizer.join(grads)
        norms = optimizer.norms(grads)
        grads = optimizer.clip(grads, optax.tree.norm(norms), optim.clip)
        updates, state = tx.update(grads, state, params, finite=True)
        return (optax.apply_updates(params, updates), state), (measured, norms)

    @jit
    def run(key):
        params = model.init(key, tokens)["params"]
        return jax.lax.scan(step, (params, tx.init(params)), None, length=11)[1]

    measured, norms = jax.device_get(run(jax.random.key(0)))
    at_0 = jax.tree.map(lambda x: x[0], measured)
    return at_0, norms | {"all": np.sqrt(sum(np.square(norm) for norm in norms.values()))}


@pytest.mark.parametrize("name", ["hy", "gf"])
def test_rwkv_has_no_share_of_the_update_at_step_0_whatever_gate_init(name):
    block = first_steps(name)[0]
    assert_allclose(block.gate, 0.7, atol=1e-6)
    assert not block.rwkv_norm.any() and block.mamba_norm.all()


def test_no_branch_has_a_share_if_both_start_at_zero():
    block = first_steps("parallel, both zero")[0]
    assert not block.rwkv_norm.any() and not block.mamba_norm.any()


def test_gradient_of_hy_is_large_at_its_first_steps():
    """RMSNorm of a zero branch has the slope 1000; it is RWKV's gradient that is large."""
    hy, gf = (first_steps(name)[1] for name in ("hy", "gf"))
    assert hy["all"][0] > 8 * gf["all"][0]
    assert hy["rwkv"][0] > 0.99 * hy["all"][0]
    assert hy["all"][10] < hy["all"][0] / 4


def test_epsilon_keeps_first_gradients_in_bounds():
    """Of each part at steps 0 to 10: HY's is then as GF's; with two zero branches five times it."""
    largest = first_steps("gf")[1]["all"].max()
    for name, times in (("hy, epsilon 0.01", 1.2), ("parallel, both zero", 5)):
        for part, norm in first_steps(name)[1].items():
            assert np.isfinite(norm).all()
            assert norm.max() < times * largest, (name, part, norm)


@pytest.mark.parametrize("start", ["init", "both", "neither"])
@pytest.mark.parametrize("init", ["official", "normal", "blinkdl"])
def test_branch_start_decides_which_outputs_are_zero(init, start):
    config = small_config(init=init, branch_start=start, layers=4)
    rwkv, mamba = (
        branch_output_init(config, official)(jax.random.key(0), shape, jnp.float32)
        for official, shape in ((nn.initializers.zeros, (32, 32)), (fan_in_uniform(0.5), (64, 32)))
    )
    as_init = {"official": (True, False), "normal": (False, False), "blinkdl": (True, True)}[init]
    wanted = {"init": as_init, "both": (True, True), "neither": (False, False)}[start]
    assert (not rwkv.any(), not mamba.any()) == wanted
    if start == "neither":
        spread = [0.02] * 2 if init == "normal" else [0.5 * n**-0.5 / 3**0.5 for n in (32, 64)]
        assert_allclose([rwkv.std(), mamba.std()], spread, rtol=0.1)


def initial(**fields):
    """Path -> array of a legacy hybrid of one block under init "reference"."""
    model = make_model(small_config(branch="legacy", init="reference", layers=1, **fields))
    params = jit(model.init)(jax.random.key(0), random_tokens(1, 2))["params"]
    return flatten_dict(jax.device_get(params), sep="/")


def test_reference_draws_all_kernels_and_embeddings_from_one_normal():
    params = initial(fusion="hgf", gate_init=0.3)
    dense = [path for path in params if path.endswith(("kernel", "embedding"))]
    assert len(dense) == 12  # 6 of RWKV, 2 of Mamba-2, 2 of the feed-forward, gate, embedding
    for path in dense:
        assert_allclose(params[path].std(), 0.02, rtol=0.15, err_msg=path)


def test_reference_starts_the_gru_model_with_framework_defaults():
    """U(+-1 / sqrt(in)) for every dense kernel, but U(+-1e-4) for the embedding."""
    params = initial(fusion="gru")
    assert 0.9e-4 < np.abs(params["embedding/embedding"]).max() <= 1e-4
    for path, x in params.items():
        if path.endswith("kernel") and "/fusion/" not in path:
            bound = x.shape[0] ** -0.5
            assert 0.98 * bound < np.abs(x).max() <= bound, path
            assert_allclose(x.std(), bound / 3**0.5, rtol=0.1, err_msg=path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "reference"}, "model.init='reference' starts .* needs model.branch='legacy'"),
        ({"branch_start": "both", "branch": "legacy"}, "model.branch_start='both' needs model.bra"),
        ({"rwkv_carry": 0.5, "branch": "legacy"}, "model.rwkv_carry=0.5 needs official RWKV-6"),
        ({"rwkv_carry": 1.5}, "model.rwkv_carry=1.5 must be between 0 and 1"),
        ({"mamba_reset": 0.7, "branches": "rwkv+rwkv"}, "model.mamba_reset=0.7 needs a hybrid wit"),
        ({"mamba_reset": 2.0}, "model.mamba_reset=2.0 must be above 0 and below 2"),
        ({"segment_token": 15}, "model.segment_token=15 must be the first of three ids below"),
        ({"branch_epsilon": 0.0}, "model.branch_epsilon=0.0 must be above 0"),
        ({"residual": "rwkv"}, "model.residual='rwkv' must be one of none, mamba, both"),
    ],
)
def test_impossible_starts_and_policies_are_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as error:
        small_config(**fields)
    assert "\n" not in str(error.value)
