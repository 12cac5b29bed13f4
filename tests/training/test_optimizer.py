import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gt_jax.models import make_config as make_model_config
from gt_jax.models import make_model
from gt_jax.training import optimizer


def parameters_of(preset, **fields):
    model = make_model(make_model_config(preset, vocab_size=65, layers=2, **fields))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree_util.tree_leaves_with_path(params)


def names_where(choose, parameters):
    return {"/".join(key.key for key in path) for path, leaf in parameters if choose(path, leaf)}


def test_weight_decay_acts_on_projections_alone():
    block = names_where(optimizer.is_decayed, parameters_of("gf-mh"))
    decayed = {name.removeprefix("blocks_1/") for name in block if name.startswith("blocks_1")}
    assert decayed == {
        "rwkv/receptance/kernel",
        "rwkv/key/kernel",
        "rwkv/value/kernel",
        "rwkv/gate/kernel",
        "rwkv/output/kernel",
        "mamba/in_proj/kernel",
        "mamba/out_proj/kernel",
        "ffn/up/kernel",
        "ffn/down/kernel",
    }
    assert all(name.startswith("blocks_") for name in block)  # neither embedding nor final norm


@pytest.mark.parametrize("preset", ["gpt2", "rwkv6", "mamba2", "cp", "rf", "hgf", "gru", "hy"])
def test_weight_decay_spares_vectors_embeddings_and_fusions(preset):
    parameters = parameters_of(preset)
    decayed = names_where(optimizer.is_decayed, parameters)
    assert decayed
    for name in decayed:
        assert not any(part in name for part in ("embedding", "positions", "fusion", "time_"))
    assert not decayed & names_where(lambda _, leaf: leaf.ndim < 2, parameters)


def test_labels_follow_the_parts_of_a_block():
    parameters = parameters_of("gf-mh")
    for path, _ in parameters:
        names = [key.key for key in path]
        expected = "rest"
        if len(names) > 1 and names[0].startswith("blocks_"):
            expected = {"rwkv": "rwkv", "mamba": "mamba", "fusion": "gate"}.get(names[1], "rest")
        assert optimizer.label(path) == expected
    assert {optimizer.label(path) for path, _ in parameters} == {"rwkv", "mamba", "gate", "rest"}


def test_schedule_warms_up_from_above_zero_and_ends_at_its_floor(make_config):
    fields = {"optim.lr": 1.0, "optim.warmup_steps": 4, "optim.min_lr_ratio": 0.1}
    schedule = optimizer.make_schedule(make_config(**fields).optim, steps=25)
    rates = np.array([schedule(n) for n in range(25)])
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    assert (np.diff(rates[4:]) < 0).all()
    np.testing.assert_allclose(rates[14], 0.1 + 0.9 / 2, rtol=1e-6)  # half way from 4 to 24
    np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-6)


def test_schedule_of_a_run_shorter_than_its_warm_up_only_warms_up(make_config):
    optim = make_config(**{"optim.lr": 1.0, "optim.warmup_steps": 10}).optim
    schedule = optimizer.make_schedule(optim, steps=3)
    np.testing.assert_allclose([schedule(n) for n in range(3)], [0.1, 0.2, 0.3], rtol=1e-6)


def test_learning_rate_multipliers_scale_the_whole_update_of_their_part(toy, make_config):
    params = jax.jit(toy.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(**fields):
        optim = make_config(**fields).optim
        tx = optimizer.make_optimizer(optim, optimizer.make_schedule(optim, 20))
        return jax.jit(lambda: tx.update(optimizer.join(grads), tx.init(params), params)[0])()

    plain = jax.tree_util.tree_leaves_with_path(updates())
    scaled = updates(**{"optim.lr_multipliers.rwkv": 2.0, "optim.lr_multipliers.gate": 0.0})
    for (path, before), after in zip(plain, jax.tree.leaves(scaled), strict=True):
        factor = {"rwkv": 2.0, "gate": 0.0}.get(optimizer.label(path), 1.0)
        np.testing.assert_allclose(after, factor * before, rtol=1e-6)


@pytest.fixture(params=[2**18, 20, 1], ids=["all joined", "some large", "all large"])
def large(request, monkeypatch):
    """Leaves from which size on are updated by themselves; the toy's have 1 to 88 numbers."""
    join = optimizer.join
    monkeypatch.setattr(optimizer, "_LARGE", request.param)
    monkeypatch.setattr(optimizer, "join", lambda tree: join(tree))  # else eval_shape has it cached


def test_updates_are_those_of_adamw_leaf_by_leaf(large, toy, make_config):
    params = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    optim = make_config(**{"optim.weight_decay": 0.3, "optim.eps": 1e-3}).optim
    schedule = optimizer.make_schedule(optim, 20)
    decayed = jax.tree_util.tree_map_with_path(optimizer.is_decayed, params)
    plain = optax.adamw(schedule, optim.b1, optim.b2, 1e-3, weight_decay=0.3, mask=decayed)
    ours = optimizer.make_optimizer(optim, schedule)
    states = [tx.init(params) for tx in (plain, ours)]
    for n in range(3):
        grads = jax.tree.map(lambda p, n=n: jnp.sin(p * 100 + n), params)
        expected, states[0] = plain.update(grads, states[0], params)
        updates, states[1] = ours.update(optimizer.join(grads), states[1], params)
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)
        jax.tree.map(compare, updates, expected)
        params = optax.apply_updates(params, updates)


def test_split_undoes_join_whatever_the_order_of_labels(large, toy):
    params = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    joined = optimizer.join(params)
    assert sum(v.size for v in jax.tree.leaves(joined)) == sum(
        p.size for p in jax.tree.leaves(params)
    )
    jax.tree.map(np.testing.assert_array_equal, optimizer.split(joined, params), params)


def test_update_that_is_not_finite_leaves_no_trace(large, toy, make_config):
    """At the very first update, too, where no moment has a bias to correct yet."""
    params = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    optim = make_config(**{"optim.weight_decay": 0.3}).optim
    tx = optimizer.make_optimizer(optim, optimizer.make_schedule(optim, 20))
    good = optimizer.join(jax.tree.map(jnp.sin, params))
    bad = optimizer.join(jax.tree.map(lambda p: jnp.where(p > 0, jnp.nan, jnp.inf), params))
    state = tx.init(params)
    for _ in range(2):
        updates, after = jax.jit(tx.update)(bad, state, params, finite=jnp.array(False))
        jax.tree.map(np.testing.assert_array_equal, after, state)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        _, state = tx.update(good, state, params, finite=jnp.array(True))
    assert state.count == 2


def test_moments_in_bfloat16_stay_near_those_in_float32(large, toy, make_config):
    params = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def run(dtype):
        optim = make_config(**{"optim.moments_dtype": dtype}).optim
        tx = optimizer.make_optimizer(optim, optimizer.make_schedule(optim, 50))
        step, now, state = jax.jit(tx.update), params, tx.init(params)
        for n in range(50):
            grads = jax.tree.map(lambda p, n=n: jnp.sin(p * 100 + 0.3 * n), params)
            updates, state = step(optimizer.join(grads), state, now)
            now = optax.apply_updates(now, updates)
        return now, state

    (exact, _), (rounded, state) = run("float32"), run("bfloat16")
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
    moved, off = (
        optax.tree.norm(jax.tree.map(jnp.subtract, exact, other)) for other in (params, rounded)
    )
    assert 0 < off < 0.02 * moved


def test_decay_is_decoupled(toy, make_config):
    """With zero gradients only decayed matrices move, by -lr * weight_decay * value."""
    params = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    optim = make_config(**{"optim.lr": 0.5, "optim.warmup_steps": 0}).optim
    tx = optimizer.make_optimizer(optim, optimizer.make_schedule(optim, 20))
    zeros = optimizer.join(jax.tree.map(jnp.zeros_like, params))
    updates, _ = tx.update(zeros, tx.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, value), update in zip(leaves, jax.tree.leaves(updates), strict=True):
        expected = -0.5 * 0.1 * value if optimizer.is_decayed(path, value) else 0 * value
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)


def test_clip_bounds_the_norm_and_leaves_small_gradients_alone(toy):
    grads = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    norm = optax.tree.norm(grads)
    np.testing.assert_allclose(optax.tree.norm(optimizer.clip(grads, norm, 0.1)), 0.1, rtol=1e-5)
    for limit in (0, 2 * norm):
        clipped = optimizer.clip(grads, norm, limit)
        jax.tree.map(np.testing.assert_array_equal, clipped, grads)


def test_norms_by_label_are_global_norms_of_their_parts(large, toy):
    grads = toy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    norms = optimizer.norms_by_label(grads)
    np.testing.assert_allclose(optax.tree.norm(norms), optax.tree.norm(grads), rtol=1e-5)
    for name, norm in norms.items():
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        squares = [np.sum(np.square(x)) for path, x in leaves if optimizer.label(path) == name]
        np.testing.assert_allclose(norm, np.sqrt(sum(squares)), rtol=1e-5)
