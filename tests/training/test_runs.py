"""Whole runs with every optimizer: resumed to the bit, begun from a model, measured at step 0."""

import jax
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, train
from gt_jax.config import default_config, from_config_dict
from gt_jax.training import metrics
from gt_jax.training.plot import step_of
from gt_jax.training.writer import Writer

OPTIMIZERS = {
    "muon, averaged": {"optim.name": "muon", "optim.ema": 0.9, "optim.schedule": "wsd"},
    "schedule_free": {"optim.name": "schedule_free", "optim.schedule": "constant"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(workdir, **fields): train a tiny Mamba-2."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("abccabbcab" * 60)

    def start(workdir, **fields):
        config = default_config()
        small = {
            "model.preset": "mamba2",
            "model.dim": 32,
            "model.layers": 1,
            "model.state_size": 8,
            "data.source": str(text),
            "optim.lr": 1e-2,
            "optim.warmup_steps": 2,
            "train.steps": 6,
            "train.batch_size": 2,
            "train.seq_len": 8,
            "train.eval_every": 2,
            "train.sample_tokens": 0,
            "checkpoint.every": 2,
            "log.every": 1,
            "log.tensorboard": False,
        }
        config.update_from_flattened_dict(small | fields)
        return train.train(from_config_dict(config), workdir)

    return start


def rows(workdir):
    drop = metrics.OF_THE_MACHINE
    return [{k: v for k, v in r.items() if k not in drop} for r in metrics.read(workdir)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_that_was_interrupted_equals_one_that_was_not(name, run, tmp_path, capsys):
    fields = OPTIMIZERS[name] | {"optim.decay_steps": 2 * (name != "schedule_free")}
    run(tmp_path / "straight", **fields)
    run(tmp_path / "cut", **fields, **{"train.max_minutes": 1e-6})  # one step
    run(tmp_path / "cut", **fields)
    said = capsys.readouterr().out
    assert "resuming at step 1" in said
    assert f"curve:       {tmp_path / 'cut' / 'curve.png'}\ncheckpoints: " in said  # no samples
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")
    both = [gt_jax.load(tmp_path / f"{name}@last")[1] for name in ("cut", "straight")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_run_from_an_average_measures_what_the_first_run_did(run, tmp_path, capsys):
    """What is saved is what was evaluated: a run from it that does not move measures the same."""
    fields = OPTIMIZERS["muon, averaged"]
    run(tmp_path / "first", **fields)
    before = metrics.read(tmp_path / "first")[-1]["validation_loss"]
    still = fields | {"model.init_from": f"{tmp_path / 'first'}@last", "optim.lr": 1e-30}
    run(tmp_path / "next", **still, **{"train.steps": 1, "train.eval_at_start": True})
    assert "first, step 6, the last" in capsys.readouterr().out
    measured = [row["validation_loss"] for row in metrics.read(tmp_path / "next")]
    assert measured == [pytest.approx(before, rel=1e-5)] * 2


def test_evaluation_before_the_first_step_changes_nothing_else(run, tmp_path):
    progress = run(tmp_path / "with", **{"train.eval_at_start": True})
    run(tmp_path / "without")
    first, *others = rows(tmp_path / "with")
    assert first["step"] == 0
    assert first["validation_loss"] > others[-1]["validation_loss"]
    assert others == rows(tmp_path / "without")
    assert progress.best_step in checkpoint.steps(tmp_path / "with")


class Killed(BaseException):
    """Stands in for kill -9: nothing of the run continues."""


def test_run_killed_at_its_end_is_ended_by_the_next_start(run, tmp_path, monkeypatch, capsys):
    """Also one that was continued after an end: its curve is of that end."""
    workdir, drawn = tmp_path / "run", []
    draw, finish = train.curve_of, Writer.finish

    def dies(writer, *, best_step):
        """As long as nothing is drawn, finish; else die when the last checkpoint is there."""
        if drawn:
            writer.steps()
            raise Killed
        finish(writer, best_step=best_step)

    for steps in (6, 8):
        fields = {"checkpoint.keep": 1, "train.steps": steps, "optim.schedule": "constant"}
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, "curve_of", lambda job: drawn.append(draw(job)) or drawn[-1])
            patch.setattr(Writer, "finish", dies)
            run(workdir, **fields)
        drawn.clear()
        left = checkpoint.steps(workdir)
        capsys.readouterr()
        run(workdir, **fields)
        best = int(checkpoint.find(f"{workdir}@best").name)
        assert checkpoint.steps(workdir) == sorted({steps, best}, reverse=True) != left
        assert step_of(workdir / "curve.png") == steps
        assert "holds a finished run" not in capsys.readouterr().out
        run(workdir, **fields)
        assert "holds a finished run" in capsys.readouterr().out
