"""Interventions change what they name, and the balancing loss is one that gradients alone see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab
from experiments.lab import command, results, variants
from experiments.lab.statistics import compare
from experiments.questions import interventions
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, make_config, make_model

jit = lab.jit(compile_fast=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FUSIONS, interventions.BALANCED, interventions.BalancedGate)


def test_balance_adds_the_gradient_of_its_loss():
    """Against a plain model to whose loss that of the recorded parts is added."""
    tokens = np.random.default_rng(0).integers(0, 11, (3, 9), dtype=np.int32)
    models = {
        fusion: make_model(
            make_config(
                "gf-mh",
                vocab_size=11,
                dim=32,
                layers=1,
                heads=1,
                state_size=8,
                impl="reference",
                fusion=fusion,
            )
        )
        for fusion in ("gf", interventions.BALANCED)
    }
    params = jit(models["gf"].init)(jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("f"), params)

    def loss(params, model):
        output, sown = model.apply({"params": params}, tokens, mutable=["activations"])
        return jax.nn.logsumexp(output.logits[..., 3:]), sown["activations"]

    def with_penalty(params):
        value, blocks = loss(params, models["gf"])
        (block,) = blocks.values()
        gate = block["fusion"]["gate"][0]
        R = jnp.sum((gate * block["rwkv_out"][0]) ** 2, -1)
        M = jnp.sum(((1 - gate) * block["mamba_out"][0]) ** 2, -1)
        return value + interventions.WEIGHT * (jnp.mean(R / (R + M)) - 0.5) ** 2, value

    balanced = lambda params: loss(params, models[interventions.BALANCED])[0]
    value, grads = jit(jax.value_and_grad(balanced))(params)
    (both, without), wanted = jit(jax.value_and_grad(with_penalty, has_aux=True))(params)
    assert both > without + 1e-3
    np.testing.assert_allclose(value, without, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), grads, wanted)


def test_verdict_names_what_is_real():
    plain = np.array([1.6, 1.61, 1.59, 1.6])
    losses = {"plain": plain, "a": plain - 0.1 + [0, 1e-3, 0, 1e-3], "b": plain * [1.1, 0.9, 1, 1]}
    said = interventions.verdict(compare(losses, against="plain"))
    assert said == "better than the plain run: a; worse: none."


def test_experiment_runs(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "interventions.json"
    text.write_text("whether it is nobler in the mind to suffer the slings of fortune\n" * 200)
    flags = ["--quick", "--seeds=2", "--only=mamba rate 0.5,gate frozen", f"--source={text}"]
    interventions.main([*flags, "--impl=reference", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    measures, (losses, *_) = result["measures"], result["tables"]
    assert [row[0] for row in losses["rows"]] == ["plain", "Mamba rate 0.5", "gate frozen"]
    for at, name in (("at 3e-4", "3e-4"), ("at its best", "best")):
        ends = [measures[f"loss {n} {at}"]["mean"] for n in ("Mamba rate 0.5", "plain")]
        pair = measures[f"Mamba rate 0.5 - plain at {name}"]
        assert pair["mean"] == pytest.approx(ends[0] - ends[1], abs=1e-4) and pair["mean"] != 0
    assert measures["R/M gradient ratio, subwords / characters"]["n"] == 2
    assert 0 < measures["Mamba share plain"]["mean"] <= 1
    assert {"loss added without RWKV plain", "loss added without Mamba plain"} <= set(measures)


def test_interventions_reach_the_config():
    options = interventions.command.parser("interventions", "?")
    variants.add_flags(options)
    options = command.parse(options, ["--quick"])
    arms = interventions.arms_of(options, interventions.INTERVENTIONS)
    plain = arms["plain"].config
    for name, (config, task) in arms.items():
        assert (config != plain) == (name != "plain"), name
        assert (task is arms["plain"].task) == (name != interventions.SUBWORDS)
    assert arms["warm-up 50 %"].config.optim.warmup_steps == 3  # of six steps
    assert arms["no warm-up"].config.optim.warmup_steps == 0 < plain.optim.warmup_steps


def test_unknown_intervention_is_one_line():
    with pytest.raises(InputError, match="--only=prayer must be of plain, RWKV rate"):
        interventions.main(["--only=prayer"])
