"""The toy tasks are learnt, measured on sequences of their own, and judged by the stated rule."""

import numpy as np
import pytest

from experiments import lab
from experiments.lab import command, families, results, tasks
from experiments.questions import toys
from gt_jax.errors import InputError


def test_families_are_compared(tmp_path, monkeypatch, plain_hybrid):
    two = {family: families.FAMILIES[family] for family in ("GF-MH", "GPT-2")}  # to be quick
    monkeypatch.setattr(toys, "FAMILIES", two)
    monkeypatch.setattr(toys, "BRANCHES", ("GPT-2",))
    out = tmp_path / "toys.json"
    toys.main(["--quick", "--seeds=2", "--tasks=Synergy", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    ((name, *right, guessed),) = result["tables"][0]["rows"]
    assert name == "synergy" and len(right) == 2
    assert 1 / 14 < guessed < 0.2  # of 14 answers
    hybrid = result["measures"]["accuracy GF-MH, synergy"]["values"]
    ((_, alone, lead, verdict),) = result["tables"][1]["rows"]
    other = result["measures"][f"accuracy {alone}, synergy"]["values"]
    assert lead["mean"] == pytest.approx(np.subtract(hybrid, other).mean(), rel=1e-3)
    assert verdict == toys.synergy(lead)


def test_task_is_learnable_and_accuracy_counts_answers():
    """A task whose answer is the token itself, which any model of the lab soon has right."""

    def echo(rng, batch, length):
        tokens = rng.integers(0, 6, (batch, length), dtype=np.int32)
        return tokens, np.where(tokens > 2, tokens, -1).astype(np.int32)

    task = lab.drawn_task("echo", echo, 6, 8, 16)
    config = lab.make_config(
        command.QUICK | {"model.preset": "gpt2", "train.steps": 40, "optim.lr": 1e-2}
    )
    runs = lab.train({"echo": lab.Arm(config, task)}, seeds=[0], compile_fast=True)["echo"]
    assert runs.targets.sum() == sum((batch.targets >= 0).sum() for batch in task.held_out)
    assert runs.accuracy()[0, -1] > 0.99 > 0.7 > toys.commonest(task.held_out)


def test_tests_are_other_sequences_than_training():
    task = lab.drawn_task("induction", tasks.induction, 16, 16, 32)
    feed = task.batches(0)
    train = {row.tobytes() for _ in range(20) for row in next(feed).inputs}
    assert not train & {row.tobytes() for batch in task.held_out for row in batch.inputs}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.11, 0.3, "yes"), (-0.2, 0.09, "no"), (0.05, 0.2, "undecided"), (None, None, "undecided")],
)
def test_synergy_follows_its_criterion(low, high, verdict):
    assert toys.synergy({"low": low, "high": high}) == verdict


def test_unknown_task_is_one_line():
    with pytest.raises(InputError, match="--tasks=copying must be of selective-copy, induction"):
        toys.main(["--tasks=copying"])
