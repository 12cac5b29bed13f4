"""Checkpoints that one row of .ci/versions writes and every row reads.

    python .ci/exchange.py write FOLDER
    python .ci/exchange.py read FOLDER ...

FOLDER gets a state after three steps for each of two optimizers, its arrays once more as NumPy
writes them, and a run of two steps. Reading compares every array with NumPy's, bit by bit, and
resumes a copy of the run for two steps more.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from gt_jax import checkpoint, train
from gt_jax.config import default_config, from_config_dict
from gt_jax.data import Batch
from gt_jax.models import make_model
from gt_jax.training import metrics
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step
from gt_jax.training.writer import Writer, restore

VOCABULARY = 97  # of the embedded text in characters
STEPS = 3
SMALL = {
    "model.preset": "gf-mh",
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 2,
    "model.state_size": 8,
    "data.order": "tracks",
    "optim.warmup_steps": 1,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.eval_tokens": 64,
    "train.sample_tokens": 8,
    "train.carry_state": True,
    "checkpoint.every": 2,
}
OPTIMIZERS = {
    "muon": {"optim.name": "muon", "optim.ema": 0.9, "optim.schedule": "wsd"},
    "schedule_free": {"optim.name": "schedule_free", "optim.schedule": "constant"},
}


def make_config(**fields):
    config = default_config()
    config.update_from_flattened_dict(SMALL | fields)
    return from_config_dict(config)


@functools.cache
def start(name):
    """The state before the first step, and the step."""
    config = make_config(**OPTIMIZERS[name])
    model = make_model(make_model_config(config, VOCABULARY))
    schedule = make_schedule(config.optim, STEPS)
    tx = make_optimizer(config.optim, schedule)
    state = jax.jit(functools.partial(init_state, model, tx, config))(jax.random.key(0))
    return state, jax.jit(make_train_step(model, tx, schedule, config))


def batch(seed):
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(2, 17), dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], None, np.ones(2, bool))


def arrays(state):
    """name -> NumPy array of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def write(folder):
    for name in OPTIMIZERS:
        state, step = start(name)
        for seed in range(STEPS):
            state, _ = step(state, batch(seed))
        with Writer(folder / name, keep=1) as writer:
            writer.save(state, {}, best_step=None)
            writer.finish(best_step=None)
        np.savez(folder / f"{name}.npz", **arrays(state))
    train.train(make_config(**{"train.steps": 2}), folder / "run")


def read(folder):
    for name in OPTIMIZERS:
        found = arrays(restore(checkpoint.find(folder / name), start(name)[0]))
        with np.load(folder / f"{name}.npz") as file:
            written = dict(file)
        assert found.keys() == written.keys(), f"{folder}: {found.keys() ^ written.keys()}"
        for leaf, value in written.items():
            same = found[leaf].dtype == value.dtype and found[leaf].tobytes() == value.tobytes()
            assert same, f"{folder}: {name}{leaf} is not what was written"
    with tempfile.TemporaryDirectory() as copy:
        run = shutil.copytree(folder / "run", Path(copy) / "run")
        train.train(make_config(**{"train.steps": 4}), run)
        steps = [row["step"] for row in metrics.read(run)]
        assert steps[-1] == 4 and steps == sorted(steps), f"{folder}: resumed to {steps}"


if __name__ == "__main__":
    action, *folders = sys.argv[1:]
    for folder in map(Path, folders):
        {"write": write, "read": read}[action](folder)
        print(f"{action} {folder}: all arrays, to the bit")
