"""Steps that are not finite leave their batch behind, and a spike of the loss is rewound."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint, train
from gt_jax.config import default_config, from_config_dict
from gt_jax.errors import InputError
from gt_jax.training import metrics
from gt_jax.training.guard import MOST_FILES, Guard, Spike
from gt_jax.training.progress import Progress
from gt_jax.training.watchdog import Watchdog


class Steps:
    """A Guard, and what it said."""

    def __init__(self, config, workdir, saved=(10,)):
        self.said, self.progress, self.step = [], Progress(), 0
        self._guard = Guard(
            config,
            self.progress,
            workdir=workdir,
            starts=lambda position: np.asarray(position["starts"]),
            saved=lambda: list(saved),
            say=self.said.append,
        )

    def add(self, batch, loss=1.0, skipped=0):
        self.step += 1
        numbers = {"loss": jnp.float32(loss), "skipped_in_a_row": jnp.int32(skipped)}
        self._guard.add(self.step, numbers, batch, {"starts": [self.step, 7]})

    def finish(self):
        self._guard.finish()


def test_steps_that_are_not_finite_end_a_run_at_most_two_steps_late(
    make_config, make_batch, tmp_path
):
    """Looked at after every step, whatever log.every says."""
    steps = Steps(make_config(**{"train.max_nonfinite": 10, "log.every": 100}), tmp_path)
    counts = [0, 1, 2, 0, *range(1, 100)]
    with pytest.raises(InputError, match="the last 10 steps were not finite"):
        for count in counts:
            steps.add(make_batch(0), skipped=count)
    assert counts[steps.step - 1] in (10, 11, 12)


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_spike_of_steps_that_are_not_finite_says_so(make_config, make_batch, tmp_path, loss):
    """Their loss may be low: only the gradient is not finite then."""
    changes = {"train.rewind_mads": 20.0, "train.rewind_steps": 2, "checkpoint.every": 10}
    steps = Steps(make_config(**changes), tmp_path, saved=())
    for step in range(60):
        steps.add(make_batch(0), 2 + 0.01 * (step % 7))
    for count in (1, 2, 0, 0):
        steps.add(make_batch(0), loss if count else 2.0, skipped=count)
    assert any(
        line.startswith(
            "spike of the loss in steps 61 to 62: not finite in loss or gradient; there"
        )
        for line in steps.said
    ), steps.said


def test_last_steps_are_looked_at_before_a_save(make_config, make_batch, tmp_path):
    steps = Steps(make_config(**{"train.max_nonfinite": 1}), tmp_path)
    steps.add(make_batch(0), skipped=1)
    with pytest.raises(InputError, match=r"train\.max_nonfinite=1\); lower optim\.lr=0\.001"):
        steps.finish()


def test_batch_that_is_not_finite_is_kept_once_an_event_and_not_without_end(
    make_config, make_batch, tmp_path
):
    steps = Steps(make_config(), tmp_path)
    for event in range(MOST_FILES + 2):
        for count in (1, 2, 0):
            steps.add(make_batch(event), loss=math.nan, skipped=count)
    steps.finish()
    folder = tmp_path / "nonfinite"
    assert len(steps.said) == MOST_FILES + 2 and len(list(folder.iterdir())) == MOST_FILES
    assert steps.said[1].endswith(f"the step is skipped; its batch is {folder / 'step4.npz'}")
    assert "this one is not written" in steps.said[-1]
    kept, batch = np.load(folder / "step4.npz"), make_batch(1)
    assert kept["step"] == 4 and kept["starts"].tolist() == [4, 7]
    np.testing.assert_array_equal(kept["inputs"], batch.inputs)
    np.testing.assert_array_equal(kept["targets"], batch.targets)


REWIND = {"train.rewind_mads": 5.0, "train.rewind_steps": 3, "checkpoint.every": 5}


def usual(count):
    """Losses with median 2 and MAD 0.1."""
    return [2 + 0.1 * (-1) ** i for i in range(count)]


@pytest.mark.parametrize(
    ("losses", "spike"),
    [
        ([*usual(30), 2.6, 2.6, 2.6], (31, 33)),
        ([*usual(30), 2.45, 2.45, 2.45], None),  # the limit is 2.5
        ([*usual(30), 9, 9, 2, 9, 9, 2, 2, 2], None),  # two in a row
        ([*usual(18), 9, 9, 9, 9, 9], (21, 23)),  # the first two count as usual: none is known yet
        ([*usual(30), math.nan, math.inf, 9], (31, 33)),
        ([*[2.0] * 30, 2.009, 2.011, 2.011, 2.011], (32, 34)),  # MAD is at least median / 1000
    ],
)
def test_spike_is_so_many_losses_in_a_row_above_the_limit(
    make_config, make_batch, tmp_path, losses, spike
):
    steps, found = Steps(make_config(**REWIND), tmp_path), None
    try:
        for loss in [*losses, 2, 2, 2]:
            steps.add(make_batch(0), loss=loss, skipped=0)
    except Spike as raised:
        found = raised.first, raised.last
        assert raised.position["starts"][0] == raised.last
        assert steps.step <= raised.last + 2
    assert found == spike


def test_spike_without_a_checkpoint_from_before_is_said_and_left(make_config, make_batch, tmp_path):
    steps = Steps(make_config(**REWIND), tmp_path, saved=(40,))
    for loss in [*usual(30), 9, 9, 9, 2, 2, 2]:
        steps.add(make_batch(0), loss=loss)
    assert len(steps.said) == 1 and "there is no checkpoint from before" in steps.said[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint.every": 4}, "needs checkpoint.every=4 to be at least train.rewind_steps"),
        ({"checkpoint.keep": 1}, "checkpoint.keep=1 at least 2"),
        ({"train.carry_state": True, "data.order": "tracks"}, "train.carry_state=True"),
    ],
)
def test_rewinding_that_cannot_be_is_refused(make_config, fields, message):
    with pytest.raises(InputError, match=message):
        make_config(**(REWIND | fields))


SETTINGS = {
    "model.preset": "mamba2",
    "model.dim": 32,
    "model.layers": 1,
    "model.state_size": 8,
    "data.order": "tracks",
    "train.batch_size": 2,
    "train.seq_len": 8,
    "train.steps": 40,
    "train.eval_every": 15,
    "train.eval_tokens": 32,
    "train.sample_tokens": 0,
    "train.rewind_mads": 20.0,
    "train.rewind_steps": 3,
    "checkpoint.every": 6,
    "log.every": 1,
    "log.tensorboard": False,
}


class Killed(Exception):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch, no_curve):
    """run(workdir, kill_at): a run whose loss is 50 too large on text with a Z in it."""
    text = "to be or not to be, that is the question.\n" * 40
    (tmp_path / "text.txt").write_text(text[:200] + "Z" * 24 + text[224:])
    config = default_config()
    config.update_from_flattened_dict(SETTINGS | {"data.source": str(tmp_path / "text.txt")})
    config = from_config_dict(config)
    prepare = train.prepare

    def run(workdir, kill_at=None):
        def prepared(*arguments):
            job = prepare(*arguments)
            bad = job.text.tokenizer.encode("Z")[0]
            calls = iter(range(1, 1000))

            def step(state, batch):
                if next(calls) == kill_at:
                    raise Killed
                state, numbers = job.train_step(state, batch)
                spikes = bool((np.asarray(batch.inputs) == bad).any())
                return state, numbers | {"loss": numbers["loss"] + 50 * spikes}

            return job._replace(train_step=step)

        monkeypatch.setattr(train, "prepare", prepared)
        return train.train(config, tmp_path / workdir)

    return run


def results(workdir):
    drop = metrics.OF_THE_MACHINE
    rows = [{k: v for k, v in r.items() if k not in drop} for r in metrics.read(workdir)]
    params = checkpoint.load(f"{workdir}@last")[1]
    return rows, [np.asarray(x).tobytes() for x in params["embedding"].values()]


def test_run_returns_before_a_spike_skips_its_data_and_resumes_to_the_bit(run, tmp_path, capsys):
    progress = run("straight")
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith("spike of the loss")]
    assert line.startswith("spike of the loss in steps 26 to 28: 5")  # Z is at 200 to 223
    assert line.endswith("(rewind 1 of at most 3)")
    assert progress.rewinds == 1
    rows = metrics.read(tmp_path / "straight")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert max(row["loss"] for row in rows) < 10
    back = max(row["step"] for row in rows if "rewinds" not in row)
    assert f"back to step {back}, without the data of steps {back + 1} to " in line
    assert rows[back]["rewound_from"] == progress.rewound_from > back

    # Killed among the suspects; resumed, and killed between them and the next checkpoint.
    with pytest.raises(Killed):
        run("killed", kill_at=progress.rewound_from)
    with pytest.raises(Killed):
        run("killed", kill_at=progress.rewound_from - back + 4)
    run("killed")
    assert results(tmp_path / "killed") == results(tmp_path / "straight")
    about = checkpoint.read_about(checkpoint.find(f"{tmp_path / 'straight'}@last"))
    assert json.loads(json.dumps(about["progress"]))["rewinds"] == 1


def test_step_that_takes_long_is_said_once_while_it_does():
    now, said = [0.0], []
    watchdog = Watchdog(said.append, clock=lambda: now[0])

    def step(number, seconds, looks=3):
        watchdog.begin(number)
        for _ in range(looks):
            now[0] += seconds / looks
            watchdog.look()

    for number in range(1, 9):
        step(number, 0.5)
    step(9, 9.0)
    step(10, 0.5)
    watchdog.pause()  # an evaluation
    now[0] += 100
    watchdog.look()
    step(11, 0.5)
    assert said == ["step 9 takes 6.0 s so far, the median is 0.5 s"]
