from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gt_jax.training import step as step_module
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_eval_step, make_train_step


@pytest.fixture(scope="session")
def build(toy, make_config):
    """build(**fields) -> (new state, jitted train step)."""

    def make(**fields):
        config = make_config(**fields)
        schedule = make_schedule(config.optim, config.train.steps)
        tx = make_optimizer(config.optim, schedule)
        step = jax.jit(make_train_step(toy, tx, schedule, config))
        return jax.jit(partial(init_state, toy, tx, config))(jax.random.key(config.seed)), step

    return make


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_loss_is_the_mean_over_counted_targets_and_gradients_are_its_own(toy, build, make_batch):
    state, step = build()
    batch = make_batch(0)

    def loss_of(params):
        logits = toy.apply({"params": params}, batch.inputs).logits
        rows = jnp.log(jnp.exp(logits).sum(-1)) - jnp.take_along_axis(
            logits, jnp.maximum(batch.targets, 0)[..., None], -1
        )[..., 0]  # fmt: skip
        return rows[batch.targets >= 0].mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert metrics["tokens"] == (batch.targets >= 0).sum()
    assert metrics["gate"].shape == (2,)
    parts = [metrics[f"grad_norm_{name}"] for name in ("rwkv", "mamba", "gate", "rest")]
    np.testing.assert_allclose(np.linalg.norm(parts), metrics["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(metrics["r_m_ratio"], parts[0] / parts[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulation_gives_the_full_batch_step(build, make_batch, name):
    """Also where microbatches hold different numbers of counted targets."""
    batch = make_batch(1)
    batch.targets[::2, 2:] = -1
    full_state, full_step = build(**{"optim.name": name})
    cut_state, cut_step = build(**{"optim.name": name, "optim.grad_accumulation": 4})
    for _ in range(3):
        full_state, full = full_step(full_state, batch)
        cut_state, cut = cut_step(cut_state, batch)
    assert_close(cut, full, rtol=2e-5)
    # Adam divides by the gradient's size: rounding of a tiny gradient shows at the size of lr.
    assert_close(cut_state.params, full_state.params, atol=2e-5)


def test_cpu_cuts_a_batch_into_parts_of_whole_rows_near_its_size(monkeypatch):
    """Of 2^16 numbers, 512 tokens of width 128; no fewer tokens for wider models."""
    cuts = {(64, 64, 128): 8, (64, 64, 32): 2, (64, 64, 1024): 8, (4, 64, 128): 1}
    cuts |= {(6, 1024, 128): 6, (67, 64, 128): 1, (66, 64, 128): 11, (8, 6, 8): 1}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        for (rows, length, width), parts in cuts.items():
            found = step_module._cuts((rows, length), 1, width)
            assert found == (parts if platform == "cpu" else 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert step_module._cuts((64, 64), 4, 128) == 2  # of each of four, 16 rows


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others take a batch in a single pass")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_in_parts_is_that_of_the_whole_batch(build, make_batch, monkeypatch, accumulation):
    """With the carried state of its rows; parts hold different numbers of counted targets."""
    batch = make_batch(1)._replace(resets=np.arange(8) >= 5)
    batch.targets[::2, 2:] = -1
    fields = {"train.carry_state": True, "data.order": "tracks"}
    fields["optim.grad_accumulation"] = accumulation
    results = {}
    for tokens in (batch.inputs.size, 2 * batch.inputs.shape[1]):
        monkeypatch.setattr(step_module, "_CPU_NUMBERS", 1)
        monkeypatch.setattr(step_module, "_CPU_TOKENS", tokens)
        state, step = build(**fields)
        for _ in range(2):
            state, metrics = step(state, batch)
        results[tokens] = state, metrics
        text = str(jax.make_jaxpr(step)(state, batch))
        assert ("length=4" in text) == (tokens != batch.inputs.size)
    (whole, of_whole), (parts, of_parts) = results.values()
    assert_close(of_parts, of_whole, rtol=2e-5)
    assert_close(parts.carry, whole.carry, rtol=1e-5, atol=1e-6)
    assert_close(parts.params, whole.params, atol=2e-5)  # as above


def test_branches_are_dropped_for_a_whole_batch(toy, make_config, make_batch, monkeypatch):
    monkeypatch.setattr(step_module, "_CPU_NUMBERS", 1)
    monkeypatch.setattr(step_module, "_CPU_TOKENS", 1)
    config = make_config(**{"train.rwkv_dropout_start": 0.5})
    rows = []

    class Recording:  # of the rows of each call
        config = toy.config

        def apply(self, variables, tokens, *args, rwkv_drop, **options):
            rows.append(tokens.shape[0])
            return toy.apply(variables, tokens, *args, rwkv_drop=rwkv_drop, **options)

    batch = make_batch(2)
    params = toy.init(jax.random.key(0), batch.inputs)["params"]
    key = jax.random.key_data(jax.random.key(1))
    model: Any = Recording()
    jax.eval_shape(step_module.make_gradients(model, config), params, None, batch, key, 0)
    assert set(rows) == {len(batch.inputs)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_carried_state_continues_rows_and_resets_zero_it(toy, build, make_batch, accumulation):
    fields = {"train.carry_state": True, "data.order": "tracks"}
    state, step = build(**fields, **{"optim.grad_accumulation": accumulation, "optim.lr": 1e-30})
    first, second = make_batch(2), make_batch(3)
    resets = np.arange(8) >= 5
    state, _ = step(state, first)
    state, metrics = step(state, second._replace(resets=resets))

    both = np.concatenate([first.inputs, second.inputs], 1)
    joined = toy.apply({"params": state.params}, both)
    alone = toy.apply({"params": state.params}, second.inputs)
    expected = jax.tree.map(
        lambda a, b: np.where(resets[:, None], b, a), joined.state, alone.state
    )  # fmt: skip
    assert_close(state.carry, expected, rtol=1e-5, atol=1e-6)
    logits = np.where(resets[:, None, None], alone.logits, joined.logits[:, 6:])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(second.targets, 0))
    expected_loss = losses[second.targets >= 0].mean()
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped_and_counted(build, make_batch, where):
    fields = {"train.carry_state": True, "data.order": "tracks"}
    state, step = build(**fields)
    state, _ = step(state, make_batch(4))
    good = state.params
    kernel = good["head"]["kernel"]
    # One NaN spoils the loss. A huge one only the gradient: the norm's squares overflow.
    bad = np.where(np.arange(kernel.size).reshape(kernel.shape) == 0, np.nan, kernel)
    if where == "gradient":
        bad = kernel * 1e38
    broken = state.replace(params={**good, "head": {"kernel": jnp.asarray(bad)}})
    after, metrics = step(broken, make_batch(5))
    after, metrics = step(after, make_batch(6))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 2, 2)
    assert not np.isfinite(metrics["grad_norm"])
    for part in ("params", "opt_state", "carry"):
        assert_close(getattr(after, part), getattr(broken, part), rtol=0)

    healed, metrics = step(after.replace(params=good), make_batch(7))
    assert (int(healed.skipped), int(healed.skipped_in_a_row)) == (2, 0)
    # Skipped steps do not use up the schedule: this is the second update.
    expected = make_schedule_rate(1)
    np.testing.assert_allclose(metrics["lr"], expected, rtol=1e-6)


def make_schedule_rate(update):
    """Warm-up over 2 updates to 1e-3."""
    return 1e-3 * (update + 1) / 2


def test_evaluation_sums_counted_targets(toy, build, make_batch):
    state, step = build(**{"optim.lr": 1e-30})
    batch = make_batch(8)
    sums, carry = jax.jit(make_eval_step(toy))(state.params, batch, None)
    _, metrics = step(state, batch)
    assert carry is None
    assert sums.tokens == (batch.targets >= 0).sum()
    np.testing.assert_allclose(sums.loss / sums.tokens, metrics["loss"], rtol=1e-6)


def test_batch_without_a_target_changes_nothing_but_decay(build, make_batch):
    state, step = build(**{"optim.weight_decay": 0.0})
    batch = make_batch(9)
    after, metrics = step(state, batch._replace(targets=np.full_like(batch.targets, -1)))
    assert metrics["loss"] == 0
    assert_close(after.params, state.params, rtol=0)


@pytest.mark.parametrize("seed", [0, 3, 2**31, 2**32 - 1])
def test_key_of_a_traced_seed_is_that_of_the_number(seed):
    """A run gives its first program the seed: resumed by a version that gave the key, it is one."""
    traced = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))(np.uint32(seed))
    np.testing.assert_array_equal(traced, jax.random.key_data(jax.random.key(seed)))
