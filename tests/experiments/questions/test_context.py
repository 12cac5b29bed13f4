"""Losses by context and by position are those of the texts they name; reach follows its rules."""

import functools

import jax
import numpy as np
import optax
import pytest

from experiments import lab
from experiments.lab import families, results
from experiments.lab.contexts import by_context
from experiments.questions import context
from gt_jax.errors import InputError
from gt_jax.models import make_config, make_model

CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # float32 sums in another order
jit = lab.jit(compile_fast=True)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 11, 400, dtype=np.int32)


def small(preset, **changes):
    """A model whose kernels are random, so that its memory matters."""
    model = make_model(
        make_config(preset, vocab_size=11, dim=32, layers=1, heads=1, impl="reference", **changes)
    )
    params = jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("f"), params)


@pytest.mark.parametrize("preset", ["gf-mh", "gpt2"])
def test_context_is_the_last_tokens_alone(preset, text):
    model, params = small(preset, max_positions=16)
    longest, lengths = (16, [4, 16]) if preset == "gpt2" else (64, [4, 64])
    places = np.linspace(longest, len(text) - 1, 5).astype(int)
    rows = np.stack([text[place - longest : place + 1] for place in places])
    fixed = {"rows": rows, "lengths": lengths, "window": 16}
    losses = jit(functools.partial(by_context, model, **fixed))(params)
    apply = jit(lambda tokens: model.apply({"params": params}, tokens).logits[:, -1])
    for length, loss in zip(lengths, losses):
        logits = apply(np.stack([text[p - length : p] for p in places]))
        wanted = optax.softmax_cross_entropy_with_integer_labels(logits, text[places]).mean()
        np.testing.assert_allclose(loss, wanted, **CLOSE)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_positions_are_read_with_and_without_a_past(text):
    model, params = small("gf-mh")
    rows = context.cut(text[:97], 32)
    assert rows.shape == (3, 33)
    np.testing.assert_array_equal(rows[:, :-1].ravel(), text[:96])
    found = jit(functools.partial(context.by_position, model, rows=rows, window=8))(params)

    @jit
    def losses(rows):
        logits = model.apply({"params": params}, rows[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean(0)

    np.testing.assert_allclose(found["carried"], losses(rows), **CLOSE)
    for start in (0, 8, 24):
        alone = losses(rows[:, start : start + 9])
        np.testing.assert_allclose(found["reset"][start : start + 8], alone, **CLOSE)
    assert found["norms"]["rwkv"].shape == found["norms"]["mamba"].shape == (4, 1)


def test_reach_follows_its_rules():
    lengths = [8, 16, 32, 64]
    up = np.log(1.4)
    losses = np.array([[3, 2, 2 + up, 2], [3, 2, 2 + 2 * up, 1], [3, 2, 1, 1]])
    np.testing.assert_array_equal(context.useful(losses, lengths, 16), [4, 1, 4])
    steady = np.array([[3, 2, 1, 1.5], [3.1, 2, 1.1, 0.9], [3, 2.1, 1.05, 1.3]])
    assert context.helps_to(steady, lengths) == 32
    assert context.helps_to(steady[:1], lengths) == 8  # one seed tells nothing
    curve = np.arange(64.0)[None]
    np.testing.assert_allclose(context.octaves(curve, lengths), [[3.5, 11.5, 23.5, 47.5]])
    # Rows of two windows of 16, the loss 1 for 8 places and then 0: 8 of 15 against 1.
    reset = np.tile(np.repeat([1.0, 0.0], 8), 2)[None]
    np.testing.assert_allclose(context.published_gain(reset, 16), 1 - np.exp(8 / 15 - 1))


def test_experiment_runs(tmp_path, monkeypatch):
    # What carries a state need not be a hybrid, which takes twice as long to compile.
    monkeypatch.setitem(families.FAMILIES, "GF-MH", families.FAMILIES["RWKV-6"])
    path, out = tmp_path / "text.txt", tmp_path / "context.json"
    path.write_text("to be or not to be that is the question\n" * 100)
    flags = ["--quick", "--seeds=2", "--models=gf-mh carried,gpt-2", "--impl=reference"]
    context.main([*flags, f"--source={path}", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    measures, (losses, _, positions) = result["measures"], result["tables"]
    assert measures["useful context GPT-2"]["values"] == [1, 1]  # as many positions as it learnt
    rows = {row[0]: row[2:] for row in losses["rows"]}
    assert rows["GPT-2"][2] is None and rows["GF-MH carried"][3]["n"] == 2
    ratio = measures["perplexity ratio 64 / 16 GF-MH carried"]["values"]
    cells = [rows["GF-MH carried"][i]["values"] for i in (3, 1)]
    np.testing.assert_allclose(ratio, np.exp(np.subtract(*cells)), rtol=1e-4)
    carried, reset = positions["rows"][:2]
    assert carried[2] == reset[2] and carried[-1] != reset[-1]


def test_bad_input_is_one_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be that is the question\n" * 10)
    with pytest.raises(InputError, match="has 40 validation tokens and 66 are needed"):
        context.main(["--quick", f"--source={path}"])
    with pytest.raises(InputError, match="--models=lstm must be of GF-MH, RWKV-6"):
        context.main(["--models=lstm"])
