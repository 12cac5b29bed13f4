"""Sampling against NumPy, one row and one rule at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.generation.sampling import Settings, choose, keep_likeliest, penalize

VOCAB = 13


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kept_by_definition(logits, top_k, top_p, min_p):
    """Ids of one row that stay, each rule applied to what the one before left."""
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    p = softmax(logits[kept].astype(np.float64))
    fewest = next((n for n in range(1, len(kept)) if p[:n].sum() >= top_p), len(kept))
    kept, p = kept[:fewest], p[:fewest]
    return {i for i, p_i in zip(kept, p) if p_i >= min_p * p[0]}


def settings_of(rows):
    """Settings of arrays from a list of dicts."""
    columns = zip(*(Settings(**row) for row in rows))
    return Settings(*(jnp.array(column) for column in columns))


def test_every_row_keeps_what_its_own_rules_define():
    rng = np.random.default_rng(0)
    rows = [
        {
            "top_k": int(rng.choice([0, 1, 3, 13, 50])),
            "top_p": float(rng.choice([1.0, 0.999, 0.7, 0.2, 1e-6])),
            "min_p": float(rng.choice([0.0, 0.05, 0.4, 1.0])),
        }
        for _ in range(300)
    ]
    logits = rng.normal(0, 2, (300, VOCAB)).astype(np.float32)
    cut = np.asarray(keep_likeliest(jnp.array(logits), settings_of(rows)))
    for row, before, after in zip(rows, logits, cut):
        kept = {int(i) for i in np.flatnonzero(np.isfinite(after))}
        assert kept == kept_by_definition(before, **row), row
        np.testing.assert_array_equal(after[sorted(kept)], before[sorted(kept)])


def test_unlikely_tokens_stay_where_no_rule_removes_them():
    """Though the probabilities before them sum to one in float32."""
    logits = jnp.array([[0.0, -30.0, -80.0, -120.0]])
    assert np.isfinite(keep_likeliest(logits, settings_of([{}]))).all()


def test_penalty_divides_or_multiplies_what_was_seen():
    logits = jnp.array([[2.0, -2.0, 1.0, 3.0]] * 2)
    seen = jnp.array([[True, True, False, False], [False] * 4])
    new = penalize(logits, seen, jnp.array([2.0, 5.0]))
    np.testing.assert_array_equal(new, [[1.0, -4.0, 1.0, 3.0], [2.0, -2.0, 1.0, 3.0]])


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ({"temperature": 0.5}, [0.01, 0.36, 0.09, 0.0]),
        ({"top_k": 2}, [0, 0.6, 0.3, 0]),
        ({"temperature": 2.0, "min_p": 0.2, "top_p": 0.99}, [0.1**0.5, 0.6**0.5, 0.3**0.5, 0]),
    ],
)
def test_draws_follow_the_distribution(row, weights):
    n = 20_000
    p = jnp.array([0.0999, 0.6, 0.3, 0.0001])
    keys = jax.random.split(jax.random.key(0), n)
    logits = jnp.broadcast_to(jnp.log(p), (n, 4))
    tokens = jax.jit(choose)(keys, logits, jnp.zeros((n, 4), bool), settings_of([row] * n))
    shares = np.bincount(tokens, minlength=4) / n
    np.testing.assert_allclose(shares, np.array(weights) / np.sum(weights), atol=0.015)


def test_temperature_zero_takes_the_likeliest_and_a_row_does_not_see_its_neighbours():
    rng = np.random.default_rng(1)
    rows = [{"temperature": t} for t in (0.0, 1.0, 0.0, 2.0)]
    rows += [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 3.0}]
    keys = jax.random.split(jax.random.key(3), len(rows))
    logits = jnp.array(rng.normal(0, 2, (len(rows), VOCAB)), jnp.float32)
    seen = jnp.array(rng.random((len(rows), VOCAB)) < 0.5)
    together = choose(keys, logits, seen, settings_of(rows))
    assert (together == jnp.argmax(logits, -1))[jnp.array([0, 2])].all()
    for i, row in enumerate(rows):
        alone = choose(keys[i : i + 1], logits[i : i + 1], seen[i : i + 1], settings_of([row]))
        assert alone[0] == together[i], row
