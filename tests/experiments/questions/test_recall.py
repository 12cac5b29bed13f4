"""Recall is counted by number of pairs, at states of one size, and judged by the stated rule."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import lab
from experiments.lab import families, results, tasks
from experiments.questions import needle, recall
from gt_jax.analysis import memories
from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.training.model import make_model_config


@pytest.mark.parametrize("size", recall.STATES)
def test_families_have_states_of_one_size(size):
    for name, changes in recall.models_of(64, 256).items():
        model_config = make_model_config(lab.make_config(recall.SHAPE | changes), 100)
        states = jax.eval_shape(functools.partial(make_model(model_config).init_state, 1))
        kept = sum(leaf.size for leaf in jax.tree.leaves(memories(states[0])))
        assert kept == (recall.state_numbers(model_config) or 0)
        if name.endswith(size):
            assert kept == 64 * recall.STATES[size]


def test_mixture_holds_every_number_of_pairs():
    makers = [functools.partial(tasks.recall, pairs=n) for n in (4, 8, 16, 32, 64)]
    tokens, targets = recall.mixture(makers, np.random.default_rng(0), 64, 256)
    assert tokens.shape == (64, 256)
    found = Counter((targets >= 0).sum(axis=1).tolist())
    assert found == {4: 13, 8: 13, 16: 13, 32: 13, 64: 12}


def test_accuracy_is_by_number_of_pairs_on_the_second_half():
    nothing = np.zeros((1, 1))
    correct = np.array([[[9, 9, 9, 1, 2, 4, 4, 5]]])  # [runs, evaluations, batches]
    runs = lab.Runs(
        points=({"seed": 0},),
        metrics={},
        steps=np.array([1]),
        nats=nothing,
        correct=correct,
        targets=np.full(8, 10),
        params=None,
        model_config=None,
        parameters=0,
        seconds=0.0,
        compile_seconds=0.0,
    )
    # Batches are of 1 and 2 pairs in turn; of the last four, 2 + 4 and 4 + 5 of 20 are right.
    np.testing.assert_allclose(recall.by_pairs(runs, 2), [[0.3, 0.45]])


def test_check_of_the_instrument():
    good = {"GPT-2": [1, 1], "RWKV-6 small": [0.9, 0.2], "RWKV-6 large": [0.9, 0.9]}
    assert recall.check(good) == "passed"
    assert recall.check(good | {"GPT-2": [1, 0.9]}) == "failed"
    assert recall.check(good | {"RWKV-6 small": [0.2, 0.9]}) == "failed"
    assert recall.check({"GPT-2": [1, 1]}) == "not made"


def test_pairs_are_as_many_as_fit():
    assert recall.pairs_in(4, 4) == [1]
    assert recall.pairs_in(63, 1024) == [1, 2, 4, 8]
    assert recall.pairs_in(64, 34) == [1, 2, 4, 8, 16]
    for length, vocabulary in ((4, 4), (64, 34)):  # the smallest there can be
        pairs = recall.pairs_in(length, vocabulary)[-1]
        rng = np.random.default_rng(0)
        tokens, _ = tasks.recall(rng, 5, length, pairs=pairs, vocab_size=vocabulary)
        assert tokens[:, : 2 * pairs].min() > 0 and tokens.max() < vocabulary


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--length=3"], "--length=3 must be at least 4"),
        (["--length=64", "--vocabulary=33"], "--vocabulary=33 must be at least 34"),
        (["--rates=fast"], "--rates"),
    ],
)
def test_impossible_sizes_are_one_line(flags, message):
    with pytest.raises(InputError, match=message):
        recall.main(flags)


def test_pairs_are_recalled(tmp_path):
    out = tmp_path / "recall.json"
    flags = ["--quick", "--seeds=2", "--models=gpt-2,mamba-2 small", "--vocabulary=64"]
    recall.main([*flags, f"--out={out}"])
    result = results.read(out)
    (table,) = result["tables"]
    assert [row[0] for row in table["rows"]] == ["GPT-2", "Mamba-2 small"]
    assert result["measures"]["recall GPT-2, 4 pairs"]["n"] == 2
    assert result["measures"]["check of the instrument"] in ("passed", "failed")
    assert out.with_suffix(".png").exists()


def test_needles_are_looked_for(tmp_path, monkeypatch, plain_hybrid):
    two = {family: families.FAMILIES[family] for family in ("GF-MH", "GPT-2")}  # to be quick
    monkeypatch.setattr(needle, "FAMILIES", two)
    text, out = tmp_path / "text.txt", tmp_path / "needle.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    flags = ["--quick", "--seeds=2", "--texts=characters"]
    needle.main([*flags, f"--source={text}", f"--out={out}"])
    result = results.read(out)
    rows = {row[0]: row[3:] for row in result["tables"][0]["rows"]}
    assert rows["GPT-2"][1] is None and rows["GF-MH"][1]["n"] == 2
    assert result["measures"]["needle accuracy GF-MH"] == rows["GF-MH"][0]


def test_a_value_is_found_if_all_of_it_is_right():
    """A model that answers the token it reads, in texts whose values are the key's last token."""
    config = make_model_config(lab.make_config({"model.preset": "gpt2", "model.dim": 32}), 32)
    init = functools.partial(make_model(config).init, tokens=np.zeros((1, 8), np.int32))
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params["embedding"]["embedding"][:] = np.eye(32)
    params["final_norm"]["scale"][:] = 1
    runs = lab.Runs(
        points=({"seed": 0},),
        metrics={},
        steps=np.array([1]),
        nats=None,
        correct=None,
        targets=None,
        params=jax.tree.map(lambda x: x[None], params),
        model_config=config,
        parameters=0,
        seconds=0.0,
        compile_seconds=0.0,
    )

    def test(depth):
        def generate(rng, batch, length):
            tokens = rng.integers(0, 32, (batch, length), dtype=np.int32)
            targets = tokens.copy()
            targets[:, -2] += depth == 0.5  # one of the two is wrong
            return tokens, targets

        return generate

    right = needle.found(runs, test, 8, quick=True)
    np.testing.assert_array_equal(right, [[1, 1, 0, 1, 1]])


def test_unknown_model_is_one_line():
    with pytest.raises(InputError, match="--models=lstm must be of GPT-2, RWKV-6 small"):
        recall.main(["--models=lstm"])
