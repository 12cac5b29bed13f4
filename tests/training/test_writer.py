import json
import os
import shutil
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
from gt_jax.training.writer import Writer, newest, restore

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


def save(workdir, state, steps, *, keep=2, keep_every=0, best_step=None):
    with Writer(workdir, keep=keep, keep_every=keep_every) as writer:
        for step in steps:
            writer.save(at(state, step), ABOUT, best_step=best_step)
        writer.finish(best_step=best_step)


def kept(workdir):
    return sorted(int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir() if p.name.isdigit())


def test_everything_comes_back_to_the_bit(tmp_path, state):
    save(tmp_path, state, [7])
    folder = checkpoint.find(tmp_path)
    assert folder.name == "7"
    assert checkpoint.read_about(folder) == ABOUT | {"format": checkpoint.FORMAT, "step": 7}
    back = restore(folder, state)
    jax.tree.map(np.testing.assert_array_equal, back, at(state, 7))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert checkpoint.find(folder) == folder


def test_what_is_saved_stays_when_the_next_step_overwrites_it(tmp_path, state):
    given = jax.tree.map(jnp.copy, at(state, 7))
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Writer(tmp_path, keep=2, keep_every=0) as writer:
        writer.save(given, ABOUT, best_step=None)
        jax.block_until_ready(overwrite(given))
        writer.finish(best_step=None)
    back = restore(checkpoint.find(tmp_path), state)
    jax.tree.map(np.testing.assert_array_equal, back, at(state, 7))


def test_the_latest_and_the_best_are_kept(tmp_path, state):
    save(tmp_path, state, [1, 2, 3, 4, 5], best_step=2)
    assert kept(tmp_path) == [2, 4, 5]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path, state):
    save(tmp_path, state, [1, 2, 3, 4, 5, 6, 7], keep=1, keep_every=3, best_step=2)
    assert kept(tmp_path) == [2, 3, 6, 7]


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


def flip(content, place):
    """The bytes with one bit turned at a share of their length."""
    i = int(place * (len(content) - 1))
    return content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :]


# What a disk, a copy or a person does to a file; None removes it.
DAMAGE = {
    "a bit at the start": lambda content: flip(content, 0),
    "a bit inside": lambda content: flip(content, 0.5),
    "a bit at the end": lambda content: flip(content, 1),
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "missing": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_checkpoint_is_set_aside_for_the_one_before(tmp_path, state, damage, capsys):
    """Every file in turn: about 20 files times 8 kinds of damage, none is read without a word."""
    save(tmp_path / "whole", state, [1, 2])
    whole = tmp_path / "whole" / checkpoint.FOLDER
    names = ["files.json", *json.loads((whole / "2" / "files.json").read_text())]
    assert {name.split("/")[0] for name in names} == {"files.json", "about", "params", "training"}
    for i, name in enumerate(names):
        run = tmp_path / str(i)
        shutil.copytree(whole, run / checkpoint.FOLDER)
        file = run / checkpoint.FOLDER / "2" / name
        content = DAMAGE[damage](file.read_bytes())
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        folder, about = newest(run)
        assert (folder.name, about["step"]) == ("1", 1)
        said = capsys.readouterr().out
        assert "is damaged (" in said and "now 2.damaged; continuing from step 1" in said
        aside = run / checkpoint.FOLDER / "2.damaged" / name
        assert (aside.read_bytes() if aside.exists() else None) == content  # nothing was deleted
        assert checkpoint.steps(run) == [1]


def test_copied_empty_or_foreign_folders_are_no_steps(tmp_path, state, capsys):
    save(tmp_path, state, [1])
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(folder / "1", folder / "41")
    shutil.copytree(folder / "1", folder / "007")
    shutil.copytree(folder / "1", folder / "9.old")
    shutil.copytree(folder / "1", folder / "²")
    (folder / "50").mkdir()
    (folder / "60").write_text("a file")
    assert newest(tmp_path)[0].name == "1"
    said = capsys.readouterr().out
    assert "41 is a copy of the checkpoint of step 1" in said and "50 is damaged" in said
    save(tmp_path, state, [2, 3])  # numbers below those of the strange folders
    assert checkpoint.steps(tmp_path) == [3, 2] and checkpoint.find(tmp_path).name == "3"
    assert {"007", "9.old", "²", "60"} <= {p.name for p in folder.iterdir()}


def test_run_without_a_whole_checkpoint_is_refused_and_left_alone(tmp_path, state):
    save(tmp_path, state, [1, 2])
    for step in ("1", "2"):
        (tmp_path / checkpoint.FOLDER / step / "about" / "metadata").write_bytes(b"{}")
    with pytest.raises(InputError, match="2 is damaged"):
        newest(tmp_path)
    assert kept(tmp_path) == [1, 2]


@pytest.mark.parametrize("files", [None, "sizes"])
def test_checkpoint_of_before_checksums_is_read_to_see_that_it_is_whole(tmp_path, state, files):
    save(tmp_path, state, [1, 2])
    folder = tmp_path / checkpoint.FOLDER / "2"
    about = folder / "about" / "metadata"
    old = {k: v for k, v in json.loads(about.read_text()).items() if k not in ("format", "step")}
    about.write_text(json.dumps(old))
    sizes = {n: size for n, (size, _) in json.loads((folder / "files.json").read_text()).items()}
    (folder / "files.json").unlink()
    if files:
        sizes["about/metadata"] = about.stat().st_size
        (folder / "files.json").write_text(json.dumps(sizes))
    assert newest(tmp_path) == (folder, old)
    jax.tree.map(np.testing.assert_array_equal, restore(folder, state), at(state, 2))
    largest = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(bytes(largest.stat().st_size))
    assert newest(tmp_path)[0].name == "1"


def test_run_that_breaks_down_finishes_the_checkpoint_under_way(tmp_path, state):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, keep=2) as writer:
        writer.save(at(state, 3), ABOUT, best_step=None)
        raise ZeroDivisionError
    checkpoint.verify(checkpoint.find(tmp_path))
    assert not list(tmp_path.rglob("*tmp*"))


def test_optimizer_of_an_earlier_version_is_no_damage_and_named(tmp_path, state, capsys):
    joined = lambda groups: {name: group["joined"] for name, group in groups.items()}
    mu, nu = joined(state.opt_state.mu), joined(state.opt_state.nu)
    save(tmp_path, state.replace(opt_state=state.opt_state._replace(mu=mu, nu=nu)), [3, 7])
    folder, _ = newest(tmp_path)
    with pytest.raises(InputError, match=r"earlier version.*--config\.model\.init_from=") as error:
        restore(folder, state)
    assert not isinstance(error.value, checkpoint.Damaged) and "\n" not in str(error.value)
    assert kept(tmp_path) == [3, 7] and capsys.readouterr().out == ""


def test_checkpoint_of_another_model_is_refused(tmp_path, state):
    save(tmp_path, state, [1])
    folder = checkpoint.find(tmp_path)
    renamed = state.replace(params={**state.params, "extra": jnp.zeros(3)})
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        restore(folder, renamed)
    head = {"kernel": jnp.zeros((5, 5))}
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        restore(folder, state.replace(params={**state.params, "head": head}))


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_run_is_not_resumed_with_nan(tmp_path, state, part):
    broken = jax.tree.map(
        lambda x: x.at[..., 0].set(jnp.nan) if x.dtype == jnp.float32 and x.ndim else x,
        getattr(state, part),
    )
    save(tmp_path, state.replace(**{part: broken}), [4])
    folder = checkpoint.find(tmp_path)
    message = rf"{folder}: {part}/.* holds [\d,]+ NaN of .*; move the folder away: the same command"
    with pytest.raises(InputError, match=message):
        restore(folder, state)


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
    # JAX would warn that the limit holds for its cache too, where compiling takes long enough.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path):
    full = run_program(tmp_path, "write")
    assert full.returncode == 1
    assert full.stderr.startswith("error: a checkpoint could not be written")
    assert "earlier ones are intact" in full.stderr and full.stderr.count("\n") == 1
    assert checkpoint.find(tmp_path).name == "1"
    read = run_program(tmp_path, "read")
    assert (read.returncode, read.stdout, read.stderr) == (0, "1\n", "")

    # Damage is found without the list of files too, which older versions may not have written.
    folder = checkpoint.find(tmp_path)
    (folder / "files.json").unlink()
    largest = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[:50])
    read = run_program(tmp_path, "read")
    assert read.returncode == 1 and read.stderr.count("\n") == 1
    assert f"{folder} is damaged" in read.stderr


def fail_at(stage, monkeypatch):
    """Make the file system refuse one stage of writing a checkpoint."""

    def refuses(usual, unfinished):
        def call(path, *rest, **options):
            if unfinished in str(path).rsplit("/", 1)[-1]:
                raise OSError(28, "No space left on device")
            return usual(path, *rest, **options)

        return call

    def no_seal(folder):
        raise OSError(28, "No space left on device")

    if stage == "checksums":
        monkeypatch.setattr(checkpoint, "seal", no_seal)
    elif stage == "a part's folder":
        monkeypatch.setattr(os, "mkdir", refuses(os.mkdir, "training"))
    else:
        names = {"first folder": ["mkdir"], "final name": ["rename", "replace"]}[stage]
        for name in names:
            monkeypatch.setattr(os, name, refuses(getattr(os, name), ".orbax-checkpoint-tmp"))


def test_what_a_thread_of_a_failed_save_still_writes_is_removed(tmp_path, monkeypatch):
    usual, writer = shutil.rmtree, Writer(tmp_path, keep=1)
    unfinished = writer.folder / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    late = iter([unfinished / "late"])

    def removes(folder, **options):
        usual(folder, **options)
        for file in late:
            file.parent.mkdir()
            file.write_text("written while its folder was removed")

    monkeypatch.setattr(shutil, "rmtree", removes)
    writer._clean()
    assert not unfinished.exists()


@pytest.mark.parametrize("stage", ["first folder", "a part's folder", "checksums", "final name"])
def test_failed_save_is_said_and_leaves_the_steps_before(tmp_path, state, monkeypatch, stage):
    """In the background or not: nothing of the step is ever listed, and the run can write again."""
    save(tmp_path, state, [1, 2])
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError) as error,
        Writer(tmp_path, keep=2) as writer,
    ):
        fail_at(stage, patch)
        writer.save(at(state, 3), ABOUT, best_step=None)
        writer.finish(best_step=None)
    assert "a checkpoint could not be written" in str(error.value)
    assert "No space left on device" in str(error.value) and "\n" not in str(error.value)
    assert checkpoint.steps(tmp_path) == [2, 1]
    assert not list(tmp_path.rglob("*tmp*"))
    folder, about = newest(tmp_path)
    assert about["step"] == 2
    jax.tree.map(np.testing.assert_array_equal, restore(folder, state), at(state, 2))
    save(tmp_path, state, [3])
    assert checkpoint.steps(tmp_path) == [3, 2]


def test_step_that_is_not_whole_is_never_restored(tmp_path, state):
    """What a killed process leaves of a step, under its own name or the final one."""
    save(tmp_path, state, [1, 2])
    folder = tmp_path / checkpoint.FOLDER
    unfinished = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", unfinished)
    (unfinished / "files.json").unlink()
    assert checkpoint.steps(tmp_path) == [2, 1] and newest(tmp_path)[1]["step"] == 2
    unfinished.rename(folder / "3")  # as if renamed before it was sealed
    assert newest(tmp_path)[1]["step"] == 2 and checkpoint.steps(tmp_path) == [2, 1]
    save(tmp_path, state, [3])
    assert newest(tmp_path)[1]["step"] == 3
