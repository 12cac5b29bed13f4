"""Runs side by side are the trainer's own runs, in whatever company."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import lab
from experiments.lab import programs
from gt_jax.data import evaluation_batches, make_batches
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, make_model
from gt_jax.models.fusion import gate_parameters
from gt_jax.models.gates import initial_share, logit
from gt_jax.models.layers import record
from gt_jax.training import debate
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import TrainState, init_state, make_eval_step, make_train_step
from gt_jax.training.text import read_text

SMALL = {
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 2,
    "train.batch_size": 2,
    "train.seq_len": 8,
    "train.steps": 4,
    "train.eval_every": 2,
    "optim.warmup_steps": 2,
}
POINT = {"optim.lr": 1e-2, "model.gate_init": 0.3, "optim.warmup_steps": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be that is the question\n" * 20)
    return str(path)


@pytest.fixture(scope="module")
def config(source):
    return lab.make_config(SMALL | {"data.source": source, "model.preset": "gf"})


@pytest.fixture(scope="module")
def other(source):
    return lab.make_config(SMALL | {"data.source": source, "model.preset": "gf"} | POINT)


@pytest.fixture(scope="module")
def task(config):
    return lab.text_task(config)


@pytest.fixture(scope="module")
def runs(config, other, task):
    """Two arms of one program, two seeds at four points of a sweep each, 5 runs side by side."""
    lines = []
    result = lab.train(
        {"GF": lab.Arm(config, task), "GF-MH": lab.Arm(other, task)},
        seeds=(3, 0),
        sweep={"optim.lr": (1e-3, POINT["optim.lr"]), "optim.lr_multipliers.mamba": (0.0, 1.0)},
        group=5,
        keep_params=True,
        compile_fast=True,
        show=lines.append,
    )
    assert len(lines) == 1 and "GF, GF-MH" in lines[0] and "16 runs, 5 at a time" in lines[0]
    return result


def trainer(config, seeds):
    """What gt_jax.train does, a step at a time: for each seed metrics, validation, parameters."""
    text = read_text(config)
    model = make_model(make_model_config(config, text.tokenizer.vocab_size))
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    jit = lab.jit(compile_fast=True)
    init, measure = jit(functools.partial(init_state, model, tx, config)), make_eval_step(model)
    step, measure = jit(make_train_step(model, tx, schedule, config)), jit(measure)
    shape = {"batch_size": 2, "seq_len": 8}
    held_out = evaluation_batches(text.tokens.validation, **shape)
    for seed in seeds:
        state = init(jax.random.key(seed))
        batches = make_batches(text.tokens.train, order="windows", seed=seed, **shape)
        rows, validation = [], []
        for i in range(1, config.train.steps + 1):
            state, row = step(state, next(batches))
            rows.append(row)
            if i % config.train.eval_every == 0:
                sums = [measure(state.params, batch, None)[0] for batch in held_out]
                validation.append(sum(s.loss for s in sums) / sum(s.tokens for s in sums))
        rows = jax.tree.map(lambda *x: np.stack(x), *rows)
        yield seed, *jax.device_get((rows, validation, state.params))


def test_run_equals_the_trainers(runs, other):
    for seed, rows, validation, params in trainer(other, (0, 3)):
        point = {"optim.lr": 1e-2, "optim.lr_multipliers.mamba": 1.0, "seed": seed}
        mine = runs["GF-MH"].at(point)
        assert mine.points == (point,)
        assert set(mine.metrics) == set(rows)
        for name, values in rows.items():
            np.testing.assert_allclose(mine.metrics[name][0], values, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(mine.loss()[0], validation, rtol=1e-4)
        np.testing.assert_allclose(mine.metrics["gate"][0, 0], 0.3, rtol=1e-6)
        # Adam divides by gradients, some of which are nothing but rounding: not number by number.
        flat, theirs = (ravel_pytree(tree)[0] for tree in (mine.params, params))
        assert np.linalg.norm(flat - theirs) < 2e-3 * np.linalg.norm(theirs)


def test_arms_share_their_batches_and_first_parameters(runs):
    gf, mh = (runs[name].metrics for name in ("GF", "GF-MH"))
    assert not np.array_equal(gf["loss"], mh["loss"])
    np.testing.assert_allclose(gf["gate"][:, 0], 0.5)
    assert runs["GF"].nats.shape == (8, 2, len(runs["GF"].targets))
    assert list(runs["GF"].steps) == [2, 4]
    assert np.all(runs["GF"].accuracy() <= 1)
    assert np.any(runs["GF"].accuracy() > 0.2)


@pytest.mark.optimized  # float32 sums alike to the last bit but one
def test_parts_of_the_held_out_text_make_the_whole(runs):
    whole, n = runs["GF"], len(runs["GF"].targets) // 2
    first, rest = whole.loss(slice(0, n)), whole.loss(slice(n, None))
    share = whole.targets[:n].sum() / whole.targets.sum()
    np.testing.assert_allclose(whole.loss(), share * first + (1 - share) * rest)


def test_every_swept_value_arrives(runs):
    points = [
        (p["optim.lr"], p["optim.lr_multipliers.mamba"], p["seed"]) for p in runs["GF"].points
    ]
    assert points == [(r, m, s) for r in (1e-3, 1e-2) for m in (0.0, 1.0) for s in (3, 0)]
    for rate in (1e-3, 1e-2):
        moved = runs["GF"].at({"optim.lr": rate, "seed": 0}).params["blocks_0"]["mamba"]
        assert any(not np.array_equal(*leaf) for leaf in jax.tree.leaves(moved))
    frozen = runs["GF"].at({"optim.lr_multipliers.mamba": 0.0, "seed": 0}).params["blocks_0"]
    for leaf in jax.tree.leaves(frozen["mamba"]):
        np.testing.assert_array_equal(leaf[0], leaf[1])  # whatever the rate
    assert not np.array_equal(*frozen["ffn"]["down"]["kernel"])


def test_short_memory_makes_groups(config, task, monkeypatch):
    """Whatever the grouping, every run gets its own seed and values."""

    def functions(program):
        def init(seeds, values):
            nothing = jnp.zeros(len(seeds))
            params = {"seed": 1.0 * seeds, "rate": values["optim.lr"]}
            return TrainState(nothing, nothing, params, *[nothing] * 4)

        def advance(states, values, of_run, batches):
            tokens = batches.inputs[:, of_run].sum((2, 3))  # [steps, runs]
            return states, {"tokens": tokens, "rate": tokens * 0 + values["optim.lr"]}

        def measure(params, batches):
            losses = params["seed"] + 0 * batches.inputs.sum((1, 2))[:, None]
            return losses, losses

        return init, advance, measure

    monkeypatch.setattr(programs, "functions", functions)
    sweep = {"optim.lr": (1e-3, 1e-2, 3e-2)}
    lines, results = [], []
    monkeypatch.setattr(programs, "program_bytes", lambda compiled: 300)
    for free in ([300], [100, 300], [1, 1]):  # at each compilation
        monkeypatch.setattr(programs, "bytes_free", iter(free).__next__)
        arms = {"GF": lab.Arm(config, task)}
        trained = lab.train(arms, seeds=(0, 4), sweep=sweep, keep_params=True, show=lines.append)
        results.append(trained["GF"])
    whole, *parts = results
    for line, how in zip(lines, ("6 runs,", "6 runs, 2 at a time,", "6 runs, 1 at a time,")):
        assert f"{how} 4 steps" in line
    np.testing.assert_array_equal(whole.params["seed"], [p["seed"] for p in whole.points])
    np.testing.assert_allclose(whole.params["rate"], [p["optim.lr"] for p in whole.points])
    feed = task.batches(4)
    tokens = [next(feed).inputs.sum() for _ in range(4)]
    np.testing.assert_array_equal(whole.at({"seed": 4}).metrics["tokens"], [tokens] * 3)
    for part in parts:
        jax.tree.map(np.testing.assert_array_equal, part[:6], whole[:6])


TWO_DEVICES = """
import json, sys
import jax
from experiments import lab
from experiments.lab import programs
changes = json.loads(sys.argv[1])
configs = {name: lab.make_config(changes | {"model.preset": name}) for name in ("gpt1", "gpt2")}
task = lab.text_task(configs["gpt1"])
arms = {name: lab.Arm(config, task) for name, config in configs.items()}
devices, found = jax.local_devices(), []
for count in (1, 2):
    jax.local_devices = lambda: devices[:count]
    runs = lab.train(arms, seeds=(3, 0), compile_fast=True, show=lambda line: None)
    where = programs.side_by_side(lambda job: programs.device().id, range(3))
    found.append([where, runs["gpt2"].loss().tolist()])
print(json.dumps(found))
"""


def test_programs_share_out_the_devices_and_train_alike(source):
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, json.dumps(SMALL | {"data.source": source})],
        env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (one, losses), (two, same) = json.loads(done.stdout.splitlines()[-1])
    assert one == [0, 0, 0] and two == [0, 1, 0]
    np.testing.assert_allclose(losses, same, rtol=1e-5)


def test_debate_weights_are_swept_and_terms_that_no_run_has_are_not_computed(config, task):
    repaired = dataclasses.replace(config.debate, diversity_weight=0.1)
    arms = {"plain": config, "diverse": dataclasses.replace(config, debate=repaired)}
    arms = {name: lab.Arm(each, task) for name, each in arms.items()}
    weights = (0.0, 0.2)
    for sweep in ({}, {"debate.arbiter_weight": weights}):
        plain, diverse = programs.plan(arms, [3], sweep)  # a program each: their terms differ
        assert (plain.names, diverse.names) == (["plain"], ["diverse"])
        for program, terms in ((plain, ()), (diverse, ("diversity",))):
            swept = {f: jnp.float32(0) for f in programs.SWEEPABLE}
            own = programs._with_values(program.config, swept)
            assert debate.active(own.debate) == (*terms, *(["arbiter"] if sweep else []))
            if sweep:
                assert tuple(v["debate.arbiter_weight"] for v in program.values) == weights
            diversities = {v["debate.diversity_weight"] for v in program.values}
            assert diversities == ({0.1} if terms else {0.0})


def test_what_cannot_be_swept_is_refused(config, task):
    with pytest.raises(InputError, match=r"optim\.b1 cannot be swept; one of model"):
        lab.train({"GF": lab.Arm(config, task)}, seeds=[0], sweep={"optim.b1": (0.8, 0.9)})
    rf = lab.make_config(SMALL | {"model.preset": "rf"})
    with pytest.raises(InputError, match="gate_init cannot be swept for RF, which has no gate"):
        lab.train({"RF": lab.Arm(rf, task)}, seeds=[0], sweep={"model.gate_init": (0.3,)})
    gpt = lab.make_config(SMALL | {"model.preset": "gpt2"})
    with pytest.raises(InputError, match="gate_init cannot be swept for GPT, which has no gate"):
        lab.train({"GPT": lab.Arm(gpt, task)}, seeds=[0], sweep={"model.gate_init": (0.3,)})
    with pytest.raises(InputError, match=r"optim\.lr=-0\.1 must be"):
        lab.train({"GF": lab.Arm(config, task)}, seeds=[0], sweep={"optim.lr": (0.1, -0.1)})
    with pytest.raises(InputError, match=r"optim\.rate is not a config field"):
        lab.make_config({"optim.rate": 1})


class MambaGate(nn.Module):
    """A user's fusion: a gate that sees only Mamba's output."""

    config: object

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        kernel = self.param("kernel", nn.initializers.zeros, (self.config.dim, 1))
        start = nn.initializers.constant(logit(initial_share(self)))
        gate = jax.nn.sigmoid(mamba @ kernel + self.param("bias", start, (1,)))  # [B, T, 1]
        record(self, gate=gate)
        return gate * rwkv + (1 - gate) * mamba, state


@pytest.mark.parametrize("name", ["hy", "gru", "mine"])
def test_gate_init_of_any_gated_fusion_is_swept(name, config, task, monkeypatch):
    monkeypatch.setitem(FUSIONS, "mine", MambaGate)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, fusion=name))
    arms, shares = {"arm": lab.Arm(changed, task)}, (0.2, 0.6)
    (program,) = programs.plan(arms, [3], {"model.gate_init": shares})
    seeds, values, *_ = programs.inputs_of(program, slice(None), len(shares))
    params = lab.jit(compile_fast=True)(programs.functions(program)[0])(seeds, values).params
    assert program.model_config.gate_init is None
    for i, share in enumerate(shares):
        found = params["blocks_0"]["fusion"]
        gate = gate_parameters(program.model_config, share)
        assert gate
        for path, leaf in gate.items():
            np.testing.assert_array_equal(functools.reduce(dict.get, path, found)[i], leaf)
    # What the share does not decide is the same in both runs, and from the seed alone.
    rest = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in rest:
        names = tuple(key.key for key in path)
        if names[:2] != ("blocks_0", "fusion") or names[2:] not in gate:
            np.testing.assert_array_equal(*leaf, err_msg=str(names))
