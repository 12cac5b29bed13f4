import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.errors import InputError
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state
from gt_jax.training.writer import Writer, restore

ABOUT = {"batches": {"epoch": 3, "index": 14}, "progress": {"best_loss": 1.5}}


@pytest.fixture(scope="module")
def state(toy, make_config):
    config = make_config(**{"train.carry_state": True, "data.order": "tracks"})
    tx = make_optimizer(config.optim, make_schedule(config.optim, 20))
    return jax.jit(partial(init_state, toy, tx, config))(jax.random.key(config.seed))


def at(state, step):
    return state.replace(
        step=jnp.asarray(step, jnp.int32), params=jax.tree.map(lambda x: x + step, state.params)
    )


def save(workdir, state, steps, *, keep=2, best_step=None):
    writer = Writer(workdir, keep=keep)
    for step in steps:
        writer.save(at(state, step), ABOUT, best_step=best_step)
    writer.finish(best_step=best_step)
    writer.close()


def kept(workdir):
    return sorted(int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir() if p.name.isdigit())


def test_everything_comes_back_to_the_bit(tmp_path, state):
    save(tmp_path, state, [7])
    folder = checkpoint.find(tmp_path)
    assert folder.name == "7"
    assert checkpoint.read_about(folder) == ABOUT
    back = restore(folder, state)
    jax.tree.map(np.testing.assert_array_equal, back, at(state, 7))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert checkpoint.find(folder) == folder


def test_the_latest_and_the_best_are_kept(tmp_path, state):
    save(tmp_path, state, [1, 2, 3, 4, 5], best_step=2)
    assert kept(tmp_path) == [2, 4, 5]


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


def test_every_cut_off_or_missing_file_is_noticed(tmp_path, state):
    save(tmp_path, state, [1])
    folder = checkpoint.find(tmp_path)
    for name in json.loads((folder / "files.json").read_text()):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"is damaged .*is cut off.*delete it"):
            checkpoint.read_about(folder)
        (folder / name).unlink()
        with pytest.raises(InputError, match=r"is damaged .*is missing"):
            checkpoint.read_about(folder)
        (folder / name).write_bytes(content)
    checkpoint.read_about(folder)


def test_checkpoint_of_another_model_is_refused(tmp_path, state):
    save(tmp_path, state, [1])
    folder = checkpoint.find(tmp_path)
    renamed = state.replace(params={**state.params, "extra": jnp.zeros(3)})
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        restore(folder, renamed)
    head = {"kernel": jnp.zeros((5, 5))}
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        restore(folder, state.replace(params={**state.params, "head": head}))


# Orbax's threads outlive a failure and complain: what a user sees of it needs a process to itself.
PROGRAM = """
import resource, signal, sys
import jax.numpy as jnp
from gt_jax import cli
from gt_jax import checkpoint
from gt_jax.training.step import TrainState
from gt_jax.training.writer import Writer, restore

workdir, action = sys.argv[1:]
one = jnp.ones((), jnp.int32)
state = TrainState(one, one, {"a": jnp.arange(3000.0)}, {"b": jnp.arange(9.0)}, None, one, one)

def main(argv):
    if action == "read":
        restore(checkpoint.find(workdir), state)
        print(checkpoint.find(workdir).name)
        return
    writer = Writer(workdir, keep=2)
    writer.save(state, {}, best_step=None)
    writer.finish(best_step=None)
    # A limit on the size of files stands in for a disk without room.
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    writer.save(state.replace(step=2 * one), {}, best_step=None)
    writer.finish(best_step=None)

cli.run(main)
"""


def run_program(workdir, action):
    command = [sys.executable, "-c", PROGRAM, str(workdir), action]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path):
    full = run_program(tmp_path, "write")
    assert full.returncode == 1
    assert full.stderr.startswith("error: a checkpoint could not be written")
    assert "earlier ones are intact" in full.stderr and full.stderr.count("\n") == 1
    assert checkpoint.find(tmp_path).name == "1"
    read = run_program(tmp_path, "read")
    assert (read.returncode, read.stdout, read.stderr) == (0, "1\n", "")

    # Damage is found without the list of files too, which a killed run may not have written.
    folder = checkpoint.find(tmp_path)
    (folder / "files.json").unlink()
    largest = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[:50])
    read = run_program(tmp_path, "read")
    assert read.returncode == 1 and read.stderr.count("\n") == 1
    assert f"{folder} is damaged" in read.stderr
