"""A run that collapses says so, on its screen and in curve.png, and ends if a rule says so."""

import numpy as np
import pytest

from gt_jax.config import default_config, from_config_dict
from gt_jax.train import train
from gt_jax.training import metrics, watch

TINY = {
    "model.preset": "gf",
    "model.dim": 32,
    "model.layers": 2,
    "model.heads": 1,
    "model.state_size": 8,
    "model.impl": "reference",
    "train.batch_size": 4,
    "train.seq_len": 8,
    "train.steps": 60,
    "train.eval_every": 10,
    "train.eval_tokens": 64,
    "train.sample_tokens": 0,
    "log.every": 5,
    "log.tensorboard": False,
    "optim.warmup_steps": 2,
}
# The entropy as the original's pilot had it, which wants one branch to have all the weight.
COLLAPSING = {"debate.entropy": "published", "debate.entropy_weight": 30.0, "optim.lr": 0.02}
COLLAPSING |= {"optim.lr_multipliers.gate": 5.0, "model.gate_init": 0.05}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("all the world is a stage and all the men and women merely players\n" * 20)
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run made to collapse that stops for it: (its folder, Progress, what it printed)."""
    workdir, config = tmp_path_factory.mktemp("run"), default_config()
    fields = TINY | COLLAPSING | {"log.activations": True, "train.stop_rules": "gap,collapse"}
    config.update_from_flattened_dict(fields | {"data.source": str(text)})
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("gt_jax.training.display.say", said.append)
        patch.setattr("gt_jax.train.say", said.append)
        patch.setattr("gt_jax.training.summary.say", said.append)
        progress = train(from_config_dict(config), workdir)
    return workdir, progress, "\n".join(said)


def closed_blocks(run):
    """Of the last row, by the limit in the guide."""
    gates = np.array(metrics.read(run[0])[-1]["gate"])
    return [int(layer) for layer in np.flatnonzero((gates < 0.02) | (gates > 0.98))]


def test_collapse_is_said_once_and_ends_the_run(run):
    _, progress, said = run
    assert closed_blocks(run)
    assert said.count("/60  collapse: the gate is closed in block") == 1
    for layer in closed_blocks(run):
        assert f" {layer} (RWKV's weight 0.0" in progress.broken_rule
    assert progress.evaluated == 10 and progress.broken_rule.startswith("collapse: the gate is cl")
    assert "stopped early by train.stop_rules (collapse: the gate is closed in" in said


def test_metrics_hold_activations_entropy_states_and_auxiliary_losses(run):
    row = metrics.read(run[0])[-1]
    assert 0 < row["entropy"] < np.log(40) and 0 < row["top"] < 1
    for name in ("stream_variance", "rwkv_variance", "mamba_variance", "rwkv_state_norm"):
        assert len(row[name]) == 2 and min(row[name]) > 0, name
    assert row["objective"] == pytest.approx(row["loss"] + 30 * row["debate_entropy"], rel=1e-3)


def test_curve_marks_the_blocks_that_collapsed(run, monkeypatch):
    from matplotlib.figure import Figure

    from gt_jax.training.plot import draw_curve

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    draw_curve(run[0], title="a run", unit="nats", judged_from=6)
    *_, gates = drawn[0].axes
    labels = [text.get_text() for text in gates.get_legend().get_texts()]
    marked = [layer for layer, label in enumerate(labels) if label == f"layer {layer}, closed"]
    crosses = [line for line in gates.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert marked == closed_blocks(run) and len(crosses) == len(marked)
    assert (run[0] / "curve.png").exists()


def test_closed_and_constant_gates_are_told_apart():
    row = {"gate": [0.01, 0.5, 0.99, 0.5, 0.5], "gate_std": [0.1, 0.005, 0.0, 0.2, None]}
    assert watch.collapsed(row) == {0: "closed", 1: "constant", 2: "closed"}
    assert watch.describe(watch.collapsed(row), row) == (
        "collapse: the gate is closed in blocks 0 (RWKV's weight 0.010), 2 (RWKV's weight 0.990); "
        "constant in block 1 (standard deviation 0.0050)"
    )


def test_alarm_waits_until_gates_had_time_and_speaks_when_something_changes(make_config):
    alarm = watch.Alarm(make_config(**{"train.steps": 100}))
    row = lambda step, gate: {"step": step, "gate": [gate], "gate_std": [0.1]}
    said = [alarm.look(row(*r)) for r in ((5, 0.01), (10, 0.01), (20, 0.01), (30, 0.5), (40, 0.5))]
    assert [bool(line) for line in said] == [False, True, False, True, False]
    assert said[3] == "no gate is collapsed any more"


def rows(validation, training, **more):
    """An evaluation at every step."""
    return [
        {"step": 100 + i, "validation_loss": v, "loss": t} | {n: x[i] for n, x in more.items()}
        for i, (v, t) in enumerate(zip(validation, training))
    ]


@pytest.mark.parametrize(
    ("rule", "broken", "kept"),
    [
        ("gap", rows([2.0, 1.6], [1.0, 1.0]), rows([2.0, 1.4], [1.0, 1.0])),
        ("rising", rows([2, 2.01, 2.02, 2.03, 2.04, 2.05], [2] * 6), rows([2, 2.01], [2] * 2)),
        ("rising", rows([2.0, 2.2], [2.0, 1.0]), rows([2.0, 2.2], [2.0, 2.5])),
        ("ratio", rows([2], [2], r_m_ratio=[0.05]), rows([2], [2], r_m_ratio=[0.5])),
        ("oscillation", rows([1, 2, 1, 2, 1], [1] * 5), rows([2, 1, 2, 1], [1] * 4)),
        ("collapse", rows([2], [2], gate=[[0.001]]), rows([2], [2], gate=[[0.3]])),
    ],
)  # fmt: skip
def test_every_stop_rule_breaks_where_the_guide_says(make_config, rule, broken, kept):
    config = make_config(**{"train.stop_rules": rule})
    assert watch.broken_rule(broken, config).startswith(f"{rule}: ")
    assert watch.broken_rule(kept, config) is None
    assert watch.broken_rule(broken, make_config()) is None
    early = make_config(**{"train.stop_rules": rule, "train.steps": 5000})
    assert watch.broken_rule(broken, early) is None  # too soon to judge
