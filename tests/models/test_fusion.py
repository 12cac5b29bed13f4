"""Every fusion against NumPy, its start at exactly the asked share, and a new one of one's own."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, fusion, make_model
from tests.models.small_models import jit, lively_parameters, random_tokens, small_config

D = 32


def branches(T=9):
    return tuple(jax.random.normal(jax.random.key(seed), (2, T, D)) for seed in (0, 1))


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2


def rms_norm(scale, x, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def gated(g, a, m):
    return g * a + (1 - g) * m


def gru(p, a, m, n):
    """Token by token; gates in the order reset, update, new."""
    h, fused = np.zeros((2, D)), []
    for t in range(a.shape[1]):
        x = np.hstack([a[:, t], m[:, t]]) @ p["input_kernel"] + p["input_bias"]
        y = h @ p["hidden_kernel"] + p["hidden_bias"]
        reset, update = np.split(sigmoid(x[:, : 2 * D] + y[:, : 2 * D]), 2, axis=1)
        new = np.tanh(x[:, 2 * D :] + reset * y[:, 2 * D :])
        h = (1 - update) * new + update * h
        score = h @ p["head_kernel"] + p["head_bias"]
        fused.append(gated(sigmoid(score[:, :1] - score[:, 1:]), a[:, t], m[:, t]))
    return np.stack(fused, axis=1)


def softmax_of(p, h):
    """The two weights [..., 1] that a head gives of h."""
    score = h @ p.get("head_kernel", np.eye(2)) + p["head_bias"]
    return sigmoid(score[..., :1] - score[..., 1:]), sigmoid(score[..., 1:] - score[..., :1])


def normed(p, a, m):
    return rms_norm(p["rwkv_norm"]["scale"], a, 1e-2), rms_norm(p["mamba_norm"]["scale"], m, 1e-2)


def min_gru(p, a, m, n):
    pair = np.concatenate(normed(p, a, m), -1)
    candidate, update = pair @ p["candidate_kernel"], sigmoid(pair @ p["update_kernel"])
    value = np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    s, fused = np.zeros((2, 3 * D // 2)), []
    for t in range(a.shape[1]):
        s = (1 - update[:, t]) * s + update[:, t] * value[:, t]
        w, _ = softmax_of(p, s)
        fused.append(gated(w, a[:, t], m[:, t]))
    return np.stack(fused, axis=1)


def running_mean(p, a, m, n):
    x = np.concatenate([a, m], -1)
    q = sigmoid(x @ p["kernel"] + p["bias"])
    context = np.cumsum(q * x, axis=1) / np.cumsum(q, axis=1)
    return gated(softmax_of(p, context)[0], a, m)


def glu(p, a, m, n):
    r, s = normed(p, a, m)
    combined = sigmoid(n @ p["rwkv_kernel"]) * r + sigmoid(n @ p["mamba_kernel"]) * s
    return gated(softmax_of(p, combined)[0], a, m) @ p["output_kernel"]


def parallel(p, a, m, n):
    r, s = normed(p, a, m)
    gate_r = sigmoid(n @ p["rwkv_kernel"] + p["rwkv_bias"])
    gate_m = sigmoid(n @ p["mamba_kernel"] + p["mamba_bias"])
    return (gate_r * r + gate_m * s) @ p["output_kernel"]


def parallel_scan(p, a, m, n):
    c = gated(softmax_of(p, n)[0], *normed(p, a, m))
    decay = sigmoid(n @ p["decay_kernel"] + p["decay_bias"])
    read, h, fused = sigmoid(n @ p["input_kernel"]), np.zeros((2, D)), []
    for t in range(a.shape[1]):
        h = decay[:, t] * h + (1 - decay[:, t]) * read[:, t] * c[:, t]
        fused.append(h @ p["output_kernel"])
    return np.stack(fused, axis=1)


FORMULAS = {
    "hy": lambda p, a, m, n: (
        p["rwkv_gain"] * rms_norm(p["rwkv_norm"]["scale"], a)
        + p["mamba_gain"] * rms_norm(p["mamba_norm"]["scale"], m)
    ),
    "gf": lambda p, a, m, n: gated(
        sigmoid(np.concatenate([a, m], -1) @ p["kernel"] + p["bias"])[..., None], a, m
    ),
    "hgf": lambda p, a, m, n: gated(
        sigmoid(np.concatenate([a, m], -1) @ p["kernel"] + p["bias"]), a, m
    ),
    "ws": lambda p, a, m, n: gated(p["alpha"], a, m),
    "rf": lambda p, a, m, n: a + m @ p["kernel"],
    "cp": lambda p, a, m, n: np.concatenate([a, m], -1) @ p["kernel"],
    "gru": gru,
    "mingru": min_gru,
    "linrec": running_mean,
    "glu": glu,
    "parallel": parallel,
    "pscan": parallel_scan,
}


GATED = [name for name in FUSIONS if fusion.default_share(name) is not None]


@pytest.mark.parametrize("name", FORMULAS)
def test_fusion_matches_its_formula(name):
    module = FUSIONS[name](small_config())
    a, m = branches()
    n, more = jax.random.normal(jax.random.key(2), a.shape), {}
    if getattr(module, "reads_input", False):
        more["block_input"] = n
    params = lively_parameters(module, a, m)
    fused, _ = jit(module.apply)({"params": params}, a, m, **more)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    assert_allclose(fused, FORMULAS[name](p, *map(np.float64, (a, m, n))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_is_the_slope_of_the_formula(name):
    """Along one random direction of all parameters and inputs; also where every gate is shut."""
    module = FUSIONS[name](small_config())
    *inputs, n = (jax.random.normal(jax.random.key(seed), (2, 5, D)) for seed in range(3))
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((2, 5, D))

    def summed(params, a, m, n):
        more = {"block_input": n} if getattr(module, "reads_input", False) else {}
        return jnp.sum(module.apply({"params": params}, a, m, **more)[0] * weights)

    gradient = jit(jax.grad(summed, (0, 1, 2, 3)))

    def check(scale):
        params = jax.tree.map(lambda x: scale * x, lively_parameters(module, *inputs))
        point = jax.tree.map(np.float64, (params, *inputs, n))
        along = jax.tree.map(lambda x: rng.standard_normal(x.shape), point)
        at = lambda e: jax.tree.map(lambda x, v: x + e * v, point, along)
        value = lambda e: np.sum(FORMULAS[name](*at(e)) * weights)
        product = lambda g, v: np.sum(np.float64(g) * v)
        found = jax.tree.leaves(jax.tree.map(product, gradient(params, *inputs, n), along))
        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        assert_allclose(sum(found), slope, rtol=1e-4, atol=1e-4 * np.abs(found).max())

    check(1)
    check(30)


def test_every_fusion_has_a_formula_here():
    assert set(FORMULAS) == set(FUSIONS)


def start(name, **fields):
    """Parameters, fused [B, T, D] and gate at initialisation."""
    module = FUSIONS[name](small_config(**fields))
    a, m = branches()
    params = module.init(jax.random.key(0), a, m)["params"]
    (fused, _), sown = module.apply({"params": params}, a, m, mutable=["activations"])
    return params, fused, sown.get("activations", {}).get("gate", [None])[0]


@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.7, 0.97])
@pytest.mark.parametrize("name", GATED)
def test_every_gate_starts_at_gate_init(name, share):
    params, fused, gate = start(name, gate_init=share)
    assert_allclose(gate, share, atol=1e-6)
    if name == "hy":
        assert_allclose(params["mamba_gain"], 1 - share, atol=1e-6)
    elif "output_kernel" not in params:
        assert_allclose(fused, gated(share, *branches()), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GATED if name != "hy"])
def test_gates_start_even_by_default(name):
    _, _, gate = start(name)
    assert (gate == 0.5).all()


def test_gains_start_at_seven_to_three():
    params, _, _ = start("hy")
    assert_allclose(params["rwkv_gain"], 0.7)
    assert_allclose(params["mamba_gain"], 0.3)


def test_projections_keep_their_own_spread():
    assert_allclose(start("rf", dim=32)[0]["kernel"].std(), 0.01, rtol=0.1)
    assert_allclose(start("cp")[0]["kernel"].std(), 0.02, rtol=0.1)


@pytest.mark.parametrize("name", ["gf", "hgf"])
@pytest.mark.parametrize("init", ["normal", "reference"])
def test_gate_kernels_are_zero_unless_the_reference_is_reproduced(name, init):
    if init == "normal":
        assert not start(name, init=init)[0]["kernel"].any()
    params = start(name, init=init, branch="legacy", gate_init=0.3)[0]
    assert_allclose(params["kernel"].std(), 0.02, rtol=0.3)
    # The original's HGF-MH and HGF-RH lose the bias too, and are its HGF.
    forgotten = name == "hgf" and init == "reference"
    assert_allclose(params["bias"], 0 if forgotten else np.log(0.3 / 0.7), rtol=1e-6)


class Maximum(nn.Module):
    """A new fusion, as a user writes it: the larger of both, channel by channel, times a gain."""

    config: object

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        gain = self.param("gain", nn.initializers.ones, (self.config.dim,))
        return gain * jnp.maximum(rwkv, mamba), state


def test_a_new_fusion_trains_once_it_is_in_the_dict(monkeypatch):
    monkeypatch.setitem(FUSIONS, "max", Maximum)
    model = make_model(small_config(fusion="max", layers=1))
    tokens = random_tokens(2, 9)
    params = jit(model.init)(jax.random.key(0), tokens)["params"]

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]).logits)
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    @jit
    def step(params):
        loss_before, gradient = jax.value_and_grad(loss)(params)
        return loss_before, gradient, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    before, gradient, params = step(params)
    after, *_ = step(params)
    assert gradient["blocks_0"]["fusion"]["gain"].any()
    assert after < before


@pytest.fixture
def documented(monkeypatch):
    """The fusion that docs/add_a_fusion.md shows, registered as it says."""
    text = (Path(__file__).parents[2] / "docs" / "add_a_fusion.md").read_text("utf-8")
    code = re.search(r"```python\n(class MambaGate.*?)```", text, re.DOTALL)[1]
    namespace = dict(vars(fusion))
    exec(code, namespace)
    monkeypatch.setitem(FUSIONS, "mamba-gate", namespace["MambaGate"])


@pytest.mark.parametrize("name", [*FUSIONS, "mamba-gate"])
def test_the_gate_and_its_start_are_known_from_the_fusion_alone(name, documented):
    _, _, gate = start(name)
    share = fusion.default_share(name)
    if gate is None:
        assert share is None
        with pytest.raises(InputError, match=f"no meaning for model.fusion='{name}': leave it"):
            make_model(small_config(fusion=name, gate_init=0.3))
    else:
        assert_allclose(gate, share, atol=1e-6)


@pytest.mark.parametrize("name", [*FUSIONS, "mamba-gate"])
def test_gate_parameters_are_all_that_gate_init_changes(name, documented):
    config = small_config(fusion=name)
    if fusion.default_share(name) is None:
        assert fusion.gate_parameters(config, 0.3) == {}
        return
    begin = lambda share: flatten_dict(start(name, gate_init=share)[0])
    default, wanted = flatten_dict(start(name)[0]), begin(0.2)
    gate = fusion.gate_parameters(config, 0.2)
    assert gate
    for path, leaf in (default | gate).items():
        assert_allclose(leaf, wanted[path], rtol=2e-7)  # GRU's logarithm rounds once


class Drawn(nn.Module):
    """A gate that starts somewhere around gate_init."""

    config: object

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        around = lambda key: fusion.initial_share(self) + 0.1 * jax.random.normal(key)
        gate = self.param("gate", around)
        return gate * rwkv + (1 - gate) * mamba, state


def test_a_gate_that_starts_at_random_cannot_be_set(monkeypatch):
    monkeypatch.setitem(FUSIONS, "drawn", Drawn)
    with pytest.raises(InputError, match=r"model\.fusion='drawn' draws gate at random around"):
        fusion.gate_parameters(small_config(fusion="drawn"), 0.3)
