"""Facts are stated first, asked for later; the score counts turns until one is forgotten."""

import functools

import numpy as np
import pytest

from experiments.lab import results
from experiments.questions import persistence
from gt_jax.errors import InputError


def test_facts_are_stated_first_and_asked_for_later():
    haystack = np.zeros(50, np.int32)
    make = functools.partial(persistence.facts, haystack=haystack, vocab_size=11)
    tokens, targets = make(np.random.default_rng(0), 4, 5 * persistence.TURN, asked=4)
    fact, question, wanted = tokens[:, :3], tokens[:, 64:66], targets[:, 64:66]
    assert (fact[:, 0] == 10).all() and (question[:, 0] == 10).all() and fact[:, 1:].max() < 10
    np.testing.assert_array_equal(question[:, 1], fact[:, 1])
    np.testing.assert_array_equal(wanted, fact[:, 1:])
    assert (
        (targets >= 0).sum() == 8 and (tokens[:, 3:64] == 0).all() and (tokens[:, 66:] == 0).all()
    )

    tokens, targets = make(np.random.default_rng(0), 64, 16 * persistence.TURN)
    rows, places = np.nonzero(targets[:, :-1] >= 0)
    first = tokens[rows, places] == 10
    assert (places[first] % persistence.TURN == 0).all() and (places > 0).all()
    np.testing.assert_array_equal(targets[rows[first], places[first]], tokens[rows[first], 1])
    np.testing.assert_array_equal(targets[rows[~first], places[~first]], tokens[rows[~first], 2])
    assert set(rows) == set(range(64)) and 4 < first.sum() / 64 < 7  # of 15 turns


def test_score_counts_the_turns_before_the_first_forgotten():
    right = {5: np.array([1, 1, 0.4]), 10: np.array([0.6, 0.4, 1]), 50: np.array([0.5, 1, 1])}
    np.testing.assert_array_equal(persistence.persisted(right), [100, 10, 0])


def test_experiment_runs(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "persistence.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    flags = ["--quick", "--seeds=2", "--models=gpt-2", f"--source={text}", f"--out={out}"]
    persistence.main(flags)
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    (row,) = result["tables"][0]["rows"]
    assert row[3] == result["measures"]["fact GPT-2, turn 2"] and row[3]["n"] == 2
    assert row[-1] == result["measures"]["state persistence GPT-2"]


def test_unknown_model_is_one_line():
    with pytest.raises(InputError, match="--models=lstm must be of GF-MH, RWKV-6, Mamba-2, GPT-2"):
        persistence.main(["--models=lstm"])
