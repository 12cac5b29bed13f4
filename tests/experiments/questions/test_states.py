"""State tests are of the states returned; information and coupling are as defined."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from experiments import lab
from experiments.lab import results
from experiments.questions import states
from gt_jax.analysis import memories
from gt_jax.errors import InputError
from gt_jax.models import make_config, make_model

CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # float32 sums in another order
jit = lab.jit(compile_fast=True)


@pytest.fixture(scope="module")
def small():
    """A model whose kernels are random, so that both memories matter, and texts."""
    model = make_model(
        make_config(
            "gf-mh", vocab_size=11, dim=32, layers=2, heads=1, state_size=8, impl="reference"
        )
    )
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 11, (3, 24), dtype=np.int32)
    params = jit(model.init)(jax.random.key(0), rows)["params"]
    return model, jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype("f"), params), rows


def test_tests_are_of_the_states_returned(small):
    model, params, rows = small
    probes = states.with_changes(rows)
    assert probes.shape == (8, 24)
    assert (probes[3:6, 0] != rows[:, 0]).all() and (probes[3:6, 1:] == rows[:, 1:]).all()
    assert (probes[6] == rows[0]).all() and (probes[7] == rows[0, 0]).all()
    logits, flat = jit(functools.partial(states.read, model, rows=probes, window=6))(params)
    found = states.diagnose(np.asarray(logits), jax.device_get(flat), 3)

    apply = jit(model.apply)
    whole, half = apply({"params": params}, rows), apply({"params": params}, probes[:, :12])
    first, kept = (
        {
            b: np.stack([memories(s)[b].reshape(3, -1) for s in output.state])
            for b in states.BRANCHES
        }
        for output in (apply({"params": params}, rows[:, :6]), whole)
    )
    norms = {b: np.linalg.norm(m, axis=-1) for b, m in kept.items()}
    for b in states.BRANCHES:
        np.testing.assert_allclose(found["S1 norm"][b], norms[b].mean(), **CLOSE)
        growth = norms[b] / np.linalg.norm(first[b], axis=-1)
        np.testing.assert_allclose(found["D1 norm, last chunk / first"][b], growth.mean(), **CLOSE)
        apart = [np.linalg.norm(kept[b][:, i] - kept[b][:, i - 1], axis=-1) for i in range(3)]
        difference = np.mean(np.stack(apart, 1) / norms[b])
        np.testing.assert_allclose(found["S2 difference for another text"][b], difference, **CLOSE)
        assert found["S3 difference for the same text"][b] < 1e-5
    share = (norms["rwkv"] / (norms["rwkv"] + norms["mamba"])).mean()
    np.testing.assert_allclose(found["share"], share, **CLOSE)
    changed, same = np.asarray(half.logits[3:6, -1]), np.asarray(half.logits[:3, -1])
    influence = np.linalg.norm(changed - same, axis=-1) / np.linalg.norm(same, axis=-1)
    np.testing.assert_allclose(found["D4 influence of the first token"], influence.mean(), **CLOSE)


def test_information_is_that_of_the_swapped_memory(small):
    """Against loops over texts and states in NumPy."""
    model, params, rows = small
    found = jit(functools.partial(states.information, model, rows=rows, after=16))(params)
    state = jit(model.apply)({"params": params}, rows[:, :16]).state
    go_on = jit(model.apply)
    for name, (rwkv, mamba) in states.SWAPS.items():
        nats = []
        for i in range(3):
            own = jax.tree.map(lambda x, i=i: x[i : i + 1], state)
            p = []
            for k in range(3):
                other = jax.tree.map(lambda x, k=k: x[k : k + 1], state)
                mixed = tuple(
                    a._replace(
                        rwkv=a.rwkv._replace(wkv=(b if rwkv else a).rwkv.wkv),
                        mamba=a.mamba._replace(ssm=(b if mamba else a).mamba.ssm),
                    )
                    for a, b in zip(own, other)
                )
                logits = go_on({"params": params}, rows[i : i + 1, 16:], mixed).logits[0]
                p.append(np.exp(log_softmax(np.float64(logits), axis=-1)))
            entropy = lambda p: -(p * np.log(p)).sum(-1)
            nats.append(entropy(np.mean(p, 0)) - np.mean([entropy(x) for x in p], 0))
        np.testing.assert_allclose(found[name], np.mean(nats, 0), rtol=2e-3, atol=1e-6)
        assert 0 < found[name].max() < np.log(3)


def test_scores_follow_their_rules():
    name = "S4 variance, RWKV / Mamba"
    values = ([1, 9], [1, 20], [1, 200])
    assert [states.verdict(name, v) for v in values] == ["pass", "warn", "fail"]
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.normal(size=(2, 100)), axis=1)
    metrics = {"loss": steps[:1], "grad_norm_rwkv": np.exp(steps[:1])}
    metrics["grad_norm_mamba"] = np.exp(steps[1:])
    changes = np.diff(steps[:, 10:])
    np.testing.assert_allclose(states.coupling(metrics), [np.corrcoef(changes)[0, 1]])


def test_experiment_runs(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "states.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    states.main(["--quick", "--seeds=2", "--impl=reference", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    measures = result["measures"]
    assert 0 < measures["RWKV share of state norms"]["mean"] < 1
    for name in ("gradient coupling", "information both, next token"):
        assert measures[name]["n"] == 2
    assert measures["information RWKV, mean, untrained"]["mean"] == pytest.approx(0, abs=1e-5)
    rows = {tuple(row[:2]): row[2:] for row in result["tables"][0]["rows"]}
    assert rows["S3 difference for the same text", "RWKV"][2] == "pass"


def test_bad_seeds_are_one_line():
    with pytest.raises(InputError, match="--seeds=0 must be at least 1"):
        states.main(["--seeds=0"])
