"""How models start: which outputs are zero, how large gradients are, the original's own inits."""

import functools

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
from gt_jax.models import make_config, make_model
from gt_jax.training import optimizer
from tests.models.small_models import jit, random_tokens, small_config

HY = {"fusion": "hy"}
STARTS = {
    "gf": {"fusion": "gf"},
    "hy": HY,
    "hy, epsilon 0.01": HY | {"branch_epsilon": 1e-2},
    "hy, neither zero": HY | {"branch_start": "neither"},
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


def test_both_or_neither_branch_has_a_share_if_the_start_says_so():
    both, neither = (first_steps(n)[0] for n in ("parallel, both zero", "hy, neither zero"))
    assert not both.rwkv_norm.any() and not both.mamba_norm.any()
    assert neither.rwkv_norm.all() and neither.mamba_norm.all()


def test_gradient_of_hy_is_large_at_step_0_and_only_there():
    """RMSNorm of a zero branch has the slope 1000; it is RWKV's gradient that is large."""
    hy, gf = (first_steps(name)[1] for name in ("hy", "gf"))
    assert hy["all"][0] > 8 * gf["all"][0]
    assert hy["rwkv"][0] > 0.99 * hy["all"][0]
    assert hy["all"][1:].max() < hy["all"][0] / 3


@pytest.mark.parametrize("name", ["hy, epsilon 0.01", "hy, neither zero", "parallel, both zero"])
def test_epsilon_or_start_keeps_first_gradients_even(name):
    """Of the whole and of each part, at steps 0 to 10, against GF's largest."""
    norms, largest = first_steps(name)[1], first_steps("gf")[1]["all"].max()
    for part, norm in norms.items():
        assert np.isfinite(norm).all()
        assert norm.max() < 3 * largest, (part, norm)


@pytest.mark.parametrize("start", ["init", "both", "neither"])
@pytest.mark.parametrize("init", ["official", "normal", "blinkdl"])
def test_branch_start_decides_which_outputs_are_zero(init, start):
    config = small_config(init=init, branch_start=start, dim=64, layers=4)
    official = {"official": (True, False), "normal": (False, False), "blinkdl": (True, True)}[init]
    wanted = {"init": official, "both": (True, True), "neither": (False, False)}[start]
    block = output_kernels(config)
    assert tuple(not kernel.any() for kernel in block) == wanted
    if start == "neither":
        spread = 0.02 if init == "normal" else np.array([64**-0.5, 128**-0.5]) * 0.5 / 3**0.5
        assert_allclose([kernel.std() for kernel in block], spread, rtol=0.05)


def output_kernels(config):
    """The kernels that end the branches of the first block, at initialisation."""
    params = initial(config)["blocks_0"]
    return params["rwkv"]["output"]["kernel"], params["mamba"]["out_proj"]["kernel"]


@functools.cache
def initial(config):
    return jax.device_get(make_model(config).init(jax.random.key(0), random_tokens(1, 2))["params"])


def test_reference_starts_hybrids_as_the_original_does():
    """All dense kernels and embeddings N(0, 0.02), gate biases kept in GF-MH, lost in HGF-MH."""
    fields = {"vocab_size": 97, "branch": "legacy", "init": "reference", "layers": 1}
    gf, mh, rh = (
        flatten_dict(initial(make_config(name, **fields)), sep="/")
        for name in ("gf-mh", "hgf-mh", "hgf-rh")
    )
    dense = [path for path in gf if path.endswith(("kernel", "embedding"))]
    assert len(dense) >= 12
    for path in dense:
        assert_allclose(gf[path].std(), 0.02, rtol=0.15, err_msg=path)
    assert_allclose(gf["blocks_0/fusion/bias"], np.log(0.3 / 0.7), rtol=1e-6)
    assert all(np.array_equal(mh[path], rh[path]) for path in mh)
    assert not mh["blocks_0/fusion/bias"].any()


def test_reference_starts_the_gru_model_with_framework_defaults():
    """U(+-1 / sqrt(in)) for every dense kernel, but U(+-1e-4) for the embedding."""
    fields = {"vocab_size": 97, "branch": "legacy", "init": "reference", "layers": 1}
    params = flatten_dict(initial(make_config("gru", **fields)), sep="/")
    assert 0.9e-4 < np.abs(params["embedding/embedding"]).max() <= 1e-4
    for path, x in params.items():
        if path.endswith("kernel") and "/fusion/" not in path:
            bound = x.shape[0] ** -0.5
            assert 0.98 * bound < np.abs(x).max() <= bound, path
            assert_allclose(x.std(), bound / 3**0.5, rtol=0.05, err_msg=path)


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
