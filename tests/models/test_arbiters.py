"""Fusions with a memory or an eye on the block's input: time, documents, precision, long texts."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.models import FUSIONS, fusion
from gt_jax.models.scans import linear_scan
from tests.models.small_models import jit, lively_parameters, small_config

B, T, D = 2, 21, 32
IDS = np.array([[7] * 6 + [3] + [7] * 2 + [1] * 9 + [0] * 3, [5] * 2 + [6] * 18 + [4]], np.int32)
NAMES = ("gru", "mingru", "linrec", "glu", "parallel", "pscan")
WITH_MEMORY = ("gru", "mingru", "linrec", "pscan")


class Arbiter:
    """A fusion with lively parameters, applied to slices of one text."""

    def __init__(self, name, scale=1.0, **fields):
        self.module = FUSIONS[name](small_config(**fields))
        self.inputs = jax.random.normal(jax.random.key(0), (3, B, T, D), self.module.config.dtype)
        params = lively_parameters(self.module, *self.inputs[:2])
        self.params = jax.tree.map(lambda x: scale * x, params)
        self.apply = jit(self._apply)

    def _apply(self, params, inputs, state, ids):
        rwkv, mamba, n = inputs
        more = {"block_input": n} if getattr(self.module, "reads_input", False) else {}
        return self.module.apply({"params": params}, rwkv, mamba, state, ids, **more)

    def read(self, start, end, state=None, ids=None):
        return self.apply(self.params, self.inputs[:, :, start:end], state, ids)

    def step_by_step(self, start, end, state):
        fused = []
        for t in range(start, end):
            one, state = self.read(t, t + 1, state)
            fused.append(one)
        return jnp.concatenate(fused, axis=1), state


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_separate_ones_token_by_token(name):
    """Documents of 1 to 18 tokens, ids that return, another layout in each row, a state before."""
    arbiter = Arbiter(name)
    zeros = jax.tree.map(jnp.zeros_like, arbiter.read(0, 1)[1])
    _, before = arbiter.step_by_step(0, 3, zeros)
    packed, after = arbiter.read(0, T, before, IDS)
    for row in range(B):
        bounds = [0, *(np.flatnonzero(np.diff(IDS[row])) + 1), T]
        state = before
        for start, end in pairwise(bounds):
            fused, last = arbiter.step_by_step(start, end, state)
            assert_allclose(packed[row, start:end], fused[row], rtol=2e-4, atol=2e-5)
            state = zeros
        if name in WITH_MEMORY:
            assert_allclose(after[row], last[row], rtol=2e-4, atol=2e-5)
            assert np.abs(last[row]).max() > 1e-3
        else:
            assert after is None


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_weights_depend_on_what_was_seen(name):
    arbiter = Arbiter(name)
    whole, _ = arbiter.read(0, T)
    late, _ = arbiter.read(T - 1, T)
    assert np.abs(whole[:, -1] - late[:, 0]).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_branches_give_nearly_the_float32_result(name):
    exact, rounded = Arbiter(name), Arbiter(name, dtype="bfloat16")
    exact.inputs = rounded.inputs.astype(jnp.float32)
    want, got = (np.float32(arbiter.read(0, T)[0]) for arbiter in (exact, rounded))
    assert_allclose(got, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
def test_shut_and_open_gates_stay_finite(name):
    """Scores of thousands: every gate is 0 or 1, every softmax has one winner."""
    arbiter = Arbiter(name, scale=300.0)

    def loss(params, inputs):
        update, state = arbiter._apply(params, inputs, None, None)
        return sum(jnp.sum(jnp.square(x / 1e3)) for x in jax.tree.leaves((update, state)))

    value, grads = jit(jax.value_and_grad(loss, (0, 1)))(arbiter.params, arbiter.inputs)
    assert np.isfinite(value) and value > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_mean_over_65536_tokens_keeps_its_digits():
    """linrec weighs with the mean of all tokens so far, also where they scarcely count."""
    module, length = FUSIONS["linrec"](small_config()), 65536
    rng = np.random.default_rng(0)
    rwkv, mamba = (rng.standard_normal((1, length, D), np.float32) + 0.1 for _ in range(2))
    params = lively_parameters(module, rwkv, mamba)
    for bias in (0.0, -25.0):
        params["bias"] = jnp.full(1, bias)
        apply = jit(lambda p: module.apply({"params": p}, rwkv, mamba, mutable=["activations"]))
        _, sown = apply(params)
        x, p = (
            np.concatenate([rwkv, mamba], -1).astype(np.float64),
            jax.tree.map(np.float64, params),
        )
        q = 1 / (1 + np.exp(-np.maximum(x @ p["kernel"] + bias, -30)))
        context = np.cumsum(q * (x @ p["head_kernel"]), 1) / np.cumsum(q, 1) + p["head_bias"]
        want = 1 / (1 + np.exp(context[..., 1:] - context[..., :1]))
        assert_allclose(sown["activations"]["gate"][0], want, rtol=1e-3, atol=1e-6)


def test_mingru_beats_the_published_closed_form_on_a_long_text():
    """The closed form exp(A + logcumsumexp(log x - A)) subtracts sums A that grow with T."""
    rng, length = np.random.default_rng(0), 8192
    update = rng.standard_normal((1, length, 4)).astype(np.float32)
    value = rng.uniform(0.5, 1.5, update.shape).astype(np.float32)
    wide = np.float64(update)
    s, exact = 0, []
    for t in range(length):
        z = 1 / (1 + np.exp(-wide[:, t]))
        s = (1 - z) * s + z * value[:, t]
        exact.append(s)
    exact = np.stack(exact, 1)

    def closed_form(update, value):
        total = jnp.cumsum(-jax.nn.softplus(update), axis=1)
        log_x = -jax.nn.softplus(-update) + jnp.log(value)
        return jnp.exp(total + jax.lax.cumlogsumexp(log_x - total, axis=1))

    ours = linear_scan(jax.nn.sigmoid(-update), jax.nn.sigmoid(update) * value)
    error = lambda s: np.abs(s / exact - 1).max()
    assert error(ours) < 1e-6 < 1e-4 < error(jit(closed_form)(update, value))


@pytest.mark.parametrize(
    ("name", "published", "biases"),
    [
        ("gru", 148_482, 0),
        ("mingru", 98_944, 2),  # b, which gate_init sets
        ("linrec", 6 * 128 + 3, 0),
        ("glu", 49_664, 2),
        ("parallel", 3 * 128**2 + 2 * 128, 2 * 128),
    ],
)
def test_parameters_are_the_published_ones_and_what_gate_init_sets(name, published, biases):
    config = small_config(fusion=name, dim=128)
    branch = jnp.zeros((1, 1, 128))
    params = jax.eval_shape(FUSIONS[name](config).init, jax.random.key(0), branch, branch)
    assert sum(x.size for x in jax.tree.leaves(params)) == published + biases
    set_by_gate = fusion.gate_parameters(config, 0.3)
    assert biases == 0 or sum(x.size for x in set_by_gate.values()) == biases
