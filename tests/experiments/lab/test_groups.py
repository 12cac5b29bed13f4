"""Training that was interrupted continues where it was, and ends as it would have."""

import itertools
import types

import jax
import numpy as np
import pytest

from experiments import lab
from experiments.lab import unfinished

STEPS = 7  # two in each stretch but the last
SMALL = {
    "model.preset": "gf",  # a toy in its place
    "model.layers": 1,
    "train.batch_size": 2,
    "train.seq_len": 8,
    "train.steps": STEPS,
    "train.eval_every": 2,
    "optim.warmup_steps": 2,
    "optim.moments_dtype": "bfloat16",  # which NumPy does not have
}


@pytest.fixture
def trial(tmp_path, monkeypatch, toys, compiled_once):
    """train() -> Runs and lines of where it continues; states are kept after every stretch."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be that is the question\n" * 20)
    config = lab.make_config(SMALL | {"data.source": str(text)})
    task = lab.text_task(config)
    options = types.SimpleNamespace(seeds=range(3), impl="auto", quick=True)
    options.out = tmp_path / "result.json"
    monkeypatch.setattr(unfinished, "SECONDS", 0)

    def train(**sweep):
        lines = []
        runs = lab.train(
            {"GF": lab.Arm(config, task)},
            seeds=options.seeds,
            sweep={"optim.lr": (1e-2,)} | sweep,
            group=2,
            keep_params=True,
            compile_fast=True,
            show=lines.append,
            kept=unfinished.Kept(options, {"GF": "config"}, task.text),
        )
        return runs["GF"], [line for line in lines if "continues" in line]

    return train


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): the training that is next ends as its state is written for the n-th time."""

    def at(number):
        save, count = unfinished.Place.save, itertools.count(1)

        def interrupted(place, *args):
            save(place, *args)
            if next(count) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(unfinished.Place, "save", interrupted)

    return at


def states(folder):
    return sorted(folder.glob("*.unfinished"))


def test_interrupted_twice_training_ends_with_the_same_bits(trial, interrupt, tmp_path):
    whole, lines = trial()
    assert not lines and not states(tmp_path), "what is measured needs no state"
    assert whole.metrics["loss"].shape == (3, STEPS)
    interrupt(2)  # of the first group, after four steps
    with pytest.raises(KeyboardInterrupt):
        trial()
    interrupt(3)  # of the second group, after four steps
    with pytest.raises(KeyboardInterrupt):
        trial()
    again, lines = trial()
    after = [line.split(",")[0] for line in lines]
    assert after == ["GF: continues after 6 steps", "GF: continues after 4 steps"]
    for name in ("metrics", "nats", "correct", "params"):
        mine, theirs = getattr(again, name), getattr(whole, name)
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert list(again.steps) == list(whole.steps) and again.seconds > 0
    assert not states(tmp_path)


def test_other_runs_and_damaged_files_are_not_continued(trial, interrupt, tmp_path):
    whole, _ = trial()
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        trial()
    (path,) = states(tmp_path)
    _, lines = trial(**{"optim.lr": (2e-2,)})
    assert not lines and path.exists()
    written = path.read_bytes()
    middle = len(written) // 2
    for damaged in (
        b"",
        written[:middle],
        written[:-1],
        written[:middle] + bytes([written[middle] ^ 1]) + written[middle + 1 :],
    ):
        path.write_bytes(damaged)
        again, lines = trial()
        assert not lines
        np.testing.assert_array_equal(again.nats, whole.nats)


def test_writing_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    place = unfinished.Place(tmp_path / "state.unfinished")
    place.save({"done": 1}, {"x": np.arange(3)})
    with pytest.raises(TypeError):
        place.save({"done": object()}, {"x": np.arange(4)})
    assert states(tmp_path) == list(tmp_path.iterdir()) == [place.path]
    about, arrays = place.load()
    assert about == {"done": 1} and len(arrays["x"]) == 3
