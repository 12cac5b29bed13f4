"""Spreads are those of the activations, and settings reach the models."""

import functools

import jax
import numpy as np
import pytest

from experiments import lab
from experiments.lab import command, programs, results
from experiments.questions import characterize
from gt_jax.models import make_config, make_model

SMALL = {"vocab_size": 11, "dim": 32, "layers": 2, "heads": 1}
jit = lab.jit(compile_fast=True)


@pytest.mark.parametrize("preset", ["gf-mh", "rwkv6", "gpt1"])
def test_profile_is_of_the_activations(preset):
    model = make_model(make_config(preset, **SMALL))
    tokens = np.random.default_rng(0).integers(0, 11, (4, 8), dtype=np.int32)
    params = jit(model.init)(jax.random.key(0), tokens)["params"]
    found = jit(functools.partial(characterize.profile, model))(params, tokens)
    assert found["block_std"].shape == (2,)
    mixers = {"gf-mh": {"rwkv", "mamba"}, "rwkv6": {"rwkv"}, "gpt1": {"attention"}}[preset]
    assert {name for name in found if name.endswith("_gain")} == {f"{m}_gain" for m in mixers}

    output, kept = jit(
        functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    )({"params": params}, tokens)
    kept = kept["intermediates"]
    for layer in range(2):
        block = kept[f"blocks_{layer}"]
        np.testing.assert_allclose(
            found["block_std"][layer], np.std(block["__call__"][0][0]), rtol=1e-4
        )
        for mixer in mixers:
            gain = np.std(block[mixer]["__call__"][0][0]) / np.std(block["mixer_norm"]["__call__"])
            np.testing.assert_allclose(found[f"{mixer}_gain"][layer], gain, rtol=1e-4)
    table = params["embedding"]["embedding"][tokens]
    start = kept["blocks_0"]["embedding_norm"]["__call__"][0] if preset == "rwkv6" else table
    if preset != "gpt1":  # has positions besides
        np.testing.assert_allclose(found["embedding_std"], np.std(start), rtol=1e-4)
    p = np.exp(output.logits - jax.nn.logsumexp(output.logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["top"], p.max(-1).mean(), rtol=1e-4)
    assert found["saturated"] == 0
    np.testing.assert_allclose(found["logit_high"], output.logits.max(), rtol=1e-4)


def test_growth_is_over_its_reference():
    profiled = {"embedding_std": np.array([0.5]), "block_std": np.array([[2.0, 3.0, 8.0]])}
    assert characterize.growth(profiled) == [16]
    assert characterize.growth(profiled, first=True) == [4]


def test_settings_that_share_a_program_are_what_they_are_alone(tmp_path):
    """Two inits, at rates of their own."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be that is the question\n" * 50)
    shared = command.QUICK | {"model.preset": "gpt1", "data.source": str(text)}
    settings = {"a": characterize.trained("normal"), "b": characterize.brief("blinkdl", 3e-3, 0.0)}
    settings["b"] = settings["b"]._replace(unit_embedding=True)
    configs = {"a": lab.make_config(shared), "b": lab.make_config(shared | {"optim.lr": 3e-3})}
    task = lab.text_task(configs["a"])
    arms = {name: lab.Arm(config, task) for name, config in configs.items()}
    look = lambda names: [
        characterize.profiles(program, settings, quick=True)
        for program in programs.plan({name: arms[name] for name in names}, (0, 3), {})
    ]
    (both,), (alone,) = look("ab"), look("b")
    assert set(both) == {"a", "b"}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, both["b"], alone["b"])
    assert np.all(both["a"]["before"]["embedding_std"] < 0.1)
    np.testing.assert_allclose(both["b"]["before"]["embedding_std"], 1, atol=0.2)


def test_experiment_runs(tmp_path, monkeypatch):
    # To be quick: two families, which are both a GPT but where the project's settings are tried.
    gpt, rwkv = (characterize.FAMILIES[family] for family in ("GPT", "RWKV-6"))
    project = {family: characterize.PROJECT[family] for family in ("GPT", "RWKV-6")}
    project["RWKV-6"] = project["RWKV-6"]._replace(changes=rwkv | project["RWKV-6"].changes)
    monkeypatch.setattr(characterize, "FAMILIES", {"RWKV-6": gpt, "GPT": gpt})
    monkeypatch.setattr(characterize, "PROJECT", project)
    monkeypatch.setattr(characterize, "PAIRS", (("GPT", "RWKV-6"),))
    text, out = tmp_path / "text.txt", tmp_path / "characterize.json"
    text.write_text("to be or not to be that is the question\n" * 200)
    characterize.main(["--quick", "--seeds=2", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    values = [
        result["measures"][f"growth {family}, unmatched"]["values"] for family in ("GPT", "RWKV-6")
    ]
    ratio = result["measures"]["growth GPT / RWKV-6, unmatched"]
    assert ratio["values"] == pytest.approx(np.divide(*values), rel=1e-3)
    rows = {tuple(row[:2]): row[2:] for row in result["tables"][0]["rows"]}
    assert rows["RWKV-6", "before"][0]["mean"] == pytest.approx(1, abs=0.2)  # scaled to one
    assert rows["GPT", "before"][0]["mean"] < 1e-4  # BlinkDL's embeddings are tiny
