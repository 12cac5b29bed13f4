"""A run that trains a part of a stored model: the rest keeps its bits and takes no memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gt_jax
from gt_jax import checkpoint
from gt_jax.config import default_config, from_config_dict
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from gt_jax.train import train
from gt_jax.training import optimizer, tuning
from gt_jax.training.metrics import read as read_metrics


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    tokenizer = CharTokenizer("abc")
    config = ModelConfig(3, "mamba2", dim=32, layers=1, state_size=8)
    params = jax.jit(make_model(config).init)(jax.random.key(5), np.zeros((1, 1), int))["params"]
    checkpoint.save_model(folder / "base", config, params, tokenizer)
    documents = ["abccabbca" * n for n in (1, 2, 3)] * 40
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text(lines)
    return folder


def config_of(stored, **changes):
    config = default_config()
    small = {
        "model.init_from": str(stored / "base"),
        "train.tune": "state",
        "data.source": str(stored / "text.jsonl"),
        "optim.lr": 0.3,
        "optim.warmup_steps": 0,
        "optim.name": "schedule_free",
        "optim.schedule": "constant",
        "train.steps": 4,
        "train.batch_size": 2,
        "train.seq_len": 24,
        "train.eval_at_start": True,
        "train.sample_tokens": 0,
        "log.tensorboard": False,
    }
    config.update_from_flattened_dict(small | changes)
    return from_config_dict(config)


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def test_only_the_states_change_in_a_run_and_after_it_resumes(stored, tmp_path, capsys, no_curve):
    train(config_of(stored, **{"train.steps": 2}), tmp_path / "run")
    assert "tune:   state, 512 parameters; all others stay as they are" in capsys.readouterr().out
    train(config_of(stored), tmp_path / "run")
    assert "resuming at step 2" in capsys.readouterr().out
    _, base, _ = gt_jax.load(stored / "base")
    model, tuned, _ = gt_jax.load(tmp_path / "run@last")
    base, tuned = flat(base), flat(tuned)
    states = {"blocks_0/mamba/init_states"}
    assert model.config.learned_states and set(tuned) - set(base) == states
    for name in base:
        np.testing.assert_array_equal(tuned[name], base[name])
    assert all(np.abs(tuned[name]).min() > 1e-3 for name in states)  # every entry learns
    rows = [row for row in read_metrics(tmp_path / "run") if "validation_loss" in row]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] - 0.01


PARAMS = {
    "blocks_0": {
        "rwkv": {"time_state": jnp.ones((2, 4, 4)), "key": {"kernel": jnp.ones((8, 8))}},
        "mamba": {"init_states": jnp.ones((1, 3, 4))},
    },
    "head": jnp.ones((64, 64)),
}
OPTIMIZERS = {
    "adamw": {"optim.ema": 0.5},
    "muon": {"optim.name": "muon", "optim.ema": 0.5},
    "schedule_free": {"optim.name": "schedule_free", "optim.schedule": "constant"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_and_remembers_the_states_alone(name, make_config):
    """As it does where they are all there is; without decay, which is for matrices."""
    config = make_config(**OPTIMIZERS[name], **{"optim.weight_decay": 0.5})
    tx = optimizer.make_optimizer(config.optim, optimizer.make_schedule(config.optim, 20))
    part = tuning.trained(PARAMS, "state")
    assert [leaf.shape for leaf in jax.tree.leaves(part)] == [(1, 3, 4), (2, 4, 4)]
    grads = jax.tree.map(jnp.sin, part)
    state = tx.init(part)
    updates, state = tx.update(optimizer.join(grads), state, part)
    assert sum(x.size for x in jax.tree.leaves(state)) <= 3 * 44 + 10  # and counts
    moved = optax.apply_updates(part, updates)
    params = tuning.joined(moved, PARAMS)
    assert params["head"] is PARAMS["head"]
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -config.optim.lr / 2, rtol=1e-4)
    average = part if config.optim.ema else None  # here not that of `moved`
    evaluated = optimizer.evaluated(params, state, average)
    assert evaluated["head"] is PARAMS["head"]
    of_states = jax.tree.leaves(tuning.trained(evaluated, "state"))
    for found, other in zip(of_states, jax.tree.leaves(average or moved), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.init_from": None}, "train.tune=state trains a part of a stored model; name one"),
        ({"model.learned_states": False}, "model.learned_states=False differs from True in"),
    ],
)
def test_what_cannot_be_tuned_says_so(stored, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(config_of(stored, **changes), tmp_path / "run")
