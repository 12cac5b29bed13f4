"""Every optimizer, schedule and average against optax's own, by loops that know nothing of ours."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gt_jax import checkpoint
from gt_jax.training import optimizer
from gt_jax.training.step import init_state, make_train_step, start_from
from gt_jax.training.writer import Writer, restore

VARIANTS = {
    "adamw": {},
    "schedule_free": {
        "optim.name": "schedule_free",
        "optim.schedule": "constant",
        "optim.frozen_steps.gate": 1,
    },
    "muon, averaged": {
        "optim.name": "muon",
        "optim.ema": 0.8,
        "optim.moments_dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module")
def initial(toy, make_config):
    """A TrainState of AdamW's."""
    config = make_config()
    tx = optimizer.make_optimizer(config.optim, optimizer.make_schedule(config.optim, 20))
    return jax.jit(functools.partial(init_state, toy, tx, config))(jax.random.key(0))


@pytest.fixture(scope="module")
def params(initial):
    return initial.params


@pytest.fixture(scope="module")
def build(toy, initial, make_config):
    """variant -> (initial state, jitted train step), made once."""

    @functools.cache
    def make(variant):
        config = make_config(**VARIANTS[variant])
        schedule = optimizer.make_schedule(config.optim, config.train.steps)
        tx = optimizer.make_optimizer(config.optim, schedule)
        step = jax.jit(make_train_step(toy, tx, schedule, config))
        return start_from(initial, initial.params, tx, config), step

    return make


def gradients(params, n):
    return jax.tree.map(lambda p: jnp.sin(p * 100 + n), params)


def by_name(params, choose):
    """A tree of choose(path joined by slashes, leaf)."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda p, x: choose(keystr(p), x), params)


def is_decayed(name, x):
    return x.ndim == 2 and "embedding" not in name and "fusion" not in name


def theirs(name, rate, params):
    """optax's optimizer with the settings of the tests below."""
    adamw = functools.partial(
        optax.adamw, rate, b2=0.97, eps=1e-4, weight_decay=0.3, mask=by_name(params, is_decayed)
    )
    if name == "schedule_free":
        return optax.contrib.schedule_free(adamw(b1=0.0), rate, b1=0.8)
    if name == "adamw":
        return adamw(b1=0.8)
    muon = optax.contrib.muon(rate, beta=0.9, weight_decay=0.3, consistent_rms=0.2)
    labels = by_name(params, lambda n, x: is_decayed(n, x) and "head" not in n)
    # optax masks a mask of the whole tree itself; a function sees what is left for AdamW.
    rest = functools.partial(by_name, choose=lambda n, x: is_decayed(n, x))
    adamw = optax.adamw(rate, 0.8, 0.97, eps=1e-4, weight_decay=0.3, mask=rest)
    return optax.partition({True: muon, False: adamw}, labels)


@pytest.mark.parametrize("large", [2**18, 20], ids=["all joined", "some large"])
@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_updates_are_those_of_optax_leaf_by_leaf(name, large, params, make_config, monkeypatch):
    join = optimizer.join
    monkeypatch.setattr(optimizer, "_LARGE", large)
    monkeypatch.setattr(optimizer, "join", lambda tree: join(tree))  # else it is cached
    fields = {"b1": 0.8, "b2": 0.97, "eps": 1e-4, "weight_decay": 0.3, "muon_momentum": 0.9}
    fields |= {"name": name, "schedule": "constant", "lr": 0.02, "warmup_steps": 3}
    optim = make_config(**{f"optim.{field}": value for field, value in fields.items()}).optim
    rate = lambda n: 0.02 * jnp.minimum((n + 1) / 3, 1)
    ours, other = optimizer.make_optimizer(optim, rate), theirs(name, rate, params)
    mine, others = params, params
    state, other_state = ours.init(mine), other.init(others)

    @jax.jit
    def both(mine, state, others, other_state, n):
        updates, state = ours.update(optimizer.join(gradients(mine, n)), state, mine)
        mine = optax.apply_updates(mine, updates)
        updates, other_state = other.update(gradients(others, n), other_state, others)
        return mine, state, optax.apply_updates(others, updates), other_state

    for n in range(5):
        mine, state, others, other_state = both(mine, state, others, other_state, n)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), mine, others)
    found = optimizer.evaluated(mine, state)
    if name == "schedule_free":
        others = optax.contrib.schedule_free_eval_params(other_state, others)
        assert optimizer.is_averaged(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, others)


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_part_that_is_held_back_moves_as_one_of_a_smaller_rate(name, params, make_config):
    """In optax, too: an average is then of what was held back, not of what would have been."""
    held = {"optim.frozen_steps.mamba": 3, "optim.part_warmup_steps.rwkv": 4}
    fields = {"name": name, "schedule": "constant", "lr": 0.02, "warmup_steps": 0, "b1": 0.8}
    fields |= {"b2": 0.97, "eps": 1e-4, "weight_decay": 0.3}
    optim = make_config(**held | {f"optim.{field}": x for field, x in fields.items()}).optim
    rates = {"mamba": lambda n: 0.02 * (n >= 3), "rwkv": lambda n: 0.005 * jnp.minimum(n + 1, 4)}
    rates["rest"] = lambda n: 0.02
    rest, b1 = functools.partial(by_name, choose=is_decayed), 0.8 if name == "adamw" else 0.0
    adamw = functools.partial(optax.adamw, b1=b1, b2=0.97, eps=1e-4, weight_decay=0.3, mask=rest)
    part = lambda path, _: next((x for x in ("rwkv", "mamba") if x in path), "rest")
    other = optax.partition({x: adamw(rates[x]) for x in rates}, by_name(params, part))
    if name == "schedule_free":
        other = optax.contrib.schedule_free(other, rates["rest"], b1=0.8)
    ours, mine, others = optimizer.make_optimizer(optim, rates["rest"]), params, params
    state, other_state = ours.init(mine), other.init(others)

    @jax.jit
    def both(mine, state, others, other_state, n):
        updates, state = ours.update(optimizer.join(gradients(mine, n)), state, mine, done=n)
        mine = optax.apply_updates(mine, updates)
        updates, other_state = other.update(gradients(others, n), other_state, others)
        return mine, state, optax.apply_updates(others, updates), other_state

    assert_close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    for n in range(6):
        mine, state, others, other_state = both(mine, state, others, other_state, n)
        jax.tree.map(assert_close, mine, others)
        found = expected = optimizer.evaluated(mine, state)
        if name == "schedule_free":
            expected = optax.contrib.schedule_free_eval_params(other_state, others)
        jax.tree.map(assert_close, found, expected)
        if n < 3:
            of_mamba = lambda tree: by_name(tree, lambda path, x: x * ("mamba" in path))
            jax.tree.map(assert_close, of_mamba(found), of_mamba(params))


def test_the_optimizer_that_contributing_shows_is_what_it_says(params, make_config):
    """Lion's updates are optax's, each part at its rate, and a broken step leaves no trace."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    namespace = dict(vars(optimizer))
    exec(re.search(r"```python\n(def _lion.*?)```", text, re.DOTALL)[1], namespace)
    rates = {"optim.lr_multipliers.mamba": 0.5}
    optim = make_config(**{"optim.weight_decay": 0.3} | rates).optim
    ours = namespace["_lion"](optim, lambda n: 0.02)
    mask = by_name(params, is_decayed)
    other = optax.lion(0.02, optim.b1, optim.b2, weight_decay=0.3, mask=mask)
    grads, state = gradients(params, 0), ours.init(params)
    (found, after), expected = (
        jax.jit(ours.update)(optimizer.join(grads), state, params),
        jax.jit(other.update)(grads, other.init(params), params)[0],
    )
    share = by_name(params, lambda name, _: 0.5 if "mamba" in name else 1.0)
    expected = jax.tree.map(lambda u, s: u * s, expected, share)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
    broken = optimizer.join(jax.tree.map(lambda g: g * jnp.nan, grads))
    still, unchanged = ours.update(broken, after, params, finite=False)
    jax.tree.map(np.testing.assert_array_equal, unchanged, after)
    assert not any(u.any() for u in jax.tree.leaves(still))


def test_muon_is_for_the_projections_of_blocks_alone(params):
    chosen = jax.tree_util.tree_map_with_path(optimizer.is_projection, params)
    assert chosen == by_name(
        params, lambda n, _: n.startswith("blocks_") and n.endswith(("rwkv/kernel", "mamba/kernel"))
    )


def test_schedules_are_those_of_optax(make_config):
    def rates(**fields):
        fields |= {"lr": 1.0, "warmup_steps": 4, "min_lr_ratio": 0.1}
        optim = make_config(**{f"optim.{name}": value for name, value in fields.items()}).optim
        return np.array([optimizer.make_schedule(optim, steps=25)(n) for n in range(25)])

    def expected(after, begin):
        """Warm-up of 4, 1 until `begin`, then `after`."""
        joined = optax.join_schedules(
            [lambda n: (n + 1) / 4, optax.constant_schedule(1.0), after], [4, begin]
        )
        return np.array([joined(n) for n in range(25)])

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    compare(rates(schedule="cosine"), expected(optax.cosine_decay_schedule(1, 20, 0.1), 4))
    compare(rates(schedule="linear"), expected(optax.linear_schedule(1, 0.1, 20), 4))
    compare(rates(schedule="constant"), expected(optax.constant_schedule(1.0), 4))
    wsd = rates(schedule="wsd", decay_steps=8)
    compare(wsd, expected(optax.linear_schedule(1, 0.1, 8), 16))
    compare(rates(schedule="wsd"), expected(optax.linear_schedule(1, 0.1, 5), 19))


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_that_is_not_finite_leaves_no_trace(variant, build, make_batch):
    state, step = build(variant)
    kept = ("params", "opt_state", "average")
    for n in range(2):  # before the first update, and after it
        broken = state.params | {"head": {"kernel": state.params["head"]["kernel"] * jnp.nan}}
        before = state.replace(params=broken)
        after, _ = step(before, make_batch(n))
        for part in kept:
            jax.tree.map(
                np.testing.assert_array_equal, *(getattr(s, part) for s in (before, after))
            )
        assert after.skipped == 1
        state, _ = step(state, make_batch(n))


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_continues_to_the_bit_and_saves_what_it_evaluates(
    variant, build, make_batch, tmp_path
):
    state, step = build(variant)
    for n in range(3):
        state, _ = step(state, make_batch(n))
    with Writer(tmp_path, keep=2) as writer:
        writer.save(state, {"progress": {}}, best_step=None)
    folder = checkpoint.find(tmp_path)
    saved = checkpoint.read_tree(folder, "params", state.params)
    jax.tree.map(np.testing.assert_array_equal, saved, state.evaluated)
    assert (saved["head"]["kernel"] != state.params["head"]["kernel"]).any() == (variant != "adamw")
    back = restore(folder, state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    for n in range(3, 5):
        (state, numbers), (back, again) = step(state, make_batch(n)), step(back, make_batch(n))
        jax.tree.map(np.testing.assert_array_equal, numbers, again)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_average_is_the_weighted_mean_of_parameters_after_updates(build, make_batch):
    """optax.ema of the parameters; a skipped step counts for nothing."""
    state, step = build("muon, averaged")
    ema = optax.ema(0.8, debias=True)
    found = ema.init(state.params)
    for n in range(5):
        state, _ = step(state, make_batch(n))
        mean, found = ema.update(state.params, found)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, state.average, mean)
        if n == 2:
            broken = jax.tree.map(lambda x: x * jnp.nan, state.params)
            after, _ = step(state.replace(params=broken), make_batch(9))
            state = after.replace(params=state.params)


def test_average_of_slow_decay_is_the_mean_in_double_precision():
    values = 2 + np.sin(np.arange(1, 50.0))
    average = jnp.float32(7)  # the parameters before the first update have no part
    for count, value in enumerate(values, 1):
        average = optimizer.update_average(average, jnp.float32(value), 0.9999, jnp.int32(count))
    weights = 0.9999 ** np.arange(len(values))[::-1]
    np.testing.assert_allclose(average, (weights * values).sum() / weights.sum(), rtol=2e-6)


@pytest.mark.parametrize("variant", ["schedule_free", "muon, averaged"])
def test_run_from_other_parameters_averages_those(variant, toy, build, make_config):
    config = make_config(**VARIANTS[variant])
    tx = optimizer.make_optimizer(config.optim, optimizer.make_schedule(config.optim, 20))
    state, _ = build(variant)
    other = jax.tree.map(lambda x: x + 1, state.params)
    begun = start_from(state, other, tx, config)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, begun.evaluated, other)
