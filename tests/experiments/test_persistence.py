"""Facts are asked for once, and the score counts the turns before the first forgotten."""

import functools

import numpy as np
import pytest

from experiments import persistence, results
from gt_jax.errors import InputError


def test_facts_are_asked_for_once():
    haystack = np.zeros(50, np.int32)
    make = functools.partial(persistence.facts, haystack=haystack, vocab_size=11)
    tokens, targets = make(np.random.default_rng(0), 4, 5 * persistence.TURN, gap=4)
    told, asked = tokens[:, :3], tokens[:, 4 * persistence.TURN :]
    assert (told[:, 0] == 10).all() and (asked[:, 0] == 10).all()
    np.testing.assert_array_equal(asked[:, 1], told[:, 1])
    np.testing.assert_array_equal(targets[:, 4 * persistence.TURN :][:, :2], told[:, 1:])
    assert (targets >= 0).sum() == 8 and told[:, 1:].max() < 10 and (tokens[:, 3:-16] == 0).all()

    tokens, targets = make(np.random.default_rng(0), 64, 16 * persistence.TURN)
    for row, wanted in zip(tokens, targets):
        marks = np.flatnonzero(row == 10)
        stated, asked = marks[::2], marks[1::2]
        assert len(stated) == len(asked) > 0
        for a, b in zip(stated, asked):
            np.testing.assert_array_equal(wanted[b : b + 2], row[a + 1 : a + 3])


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
