"""The attention baselines: NumPy's answer, and what happens at the end of the positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import erf, softmax

from gt_jax.errors import InputError
from tests.models.small_models import random_tokens, small_model

POSITIONS = 40


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def rms_norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


@pytest.mark.parametrize("kind, norm", [("gpt2", layer_norm), ("gpt1", rms_norm)])
def test_gpt_matches_the_formulas(kind, norm):
    small = small_model(kind)
    T, heads = 21, 2
    tokens = random_tokens(2, T)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), small.params)
    logits = small.apply({"params": small.params}, tokens).logits
    for row in range(2):
        x = p["embedding"]["embedding"][tokens[row]] + p["positions"][:T]
        for block in (p["blocks_0"], p["blocks_1"]):
            qkv = norm(block["mixer_norm"], x) @ block["attention"]["qkv"]["kernel"]
            q, k, v = np.moveaxis(qkv.reshape(T, 3, heads, 16), 1, 0)
            scores = np.einsum("thk,shk->hts", q, k) / 4
            scores = np.where(np.tril(np.ones((T, T))), scores, -np.inf)
            y = np.einsum("hts,shk->thk", softmax(scores, -1), v).reshape(T, 32)
            x = x + y @ block["attention"]["output"]["kernel"]
            hidden = norm(block["ffn_norm"], x) @ block["ffn"]["up"]["kernel"]
            gelu = hidden * (1 + erf(hidden / 2**0.5)) / 2
            x = x + gelu @ block["ffn"]["down"]["kernel"]
        expected = norm(p["final_norm"], x) @ p["embedding"]["embedding"].T
        assert_allclose(logits[row], expected, rtol=1e-3, atol=1e-3)


def test_too_long_a_text_is_an_error():
    model, params, apply = small_model("gpt2")
    with pytest.raises(InputError, match=r"model\.max_positions=40 must be at least the 41 tokens"):
        apply({"params": params}, random_tokens(1, POSITIONS + 1))
    full = model.init_state(1)
    full = tuple(cache._replace(length=cache.length + POSITIONS) for cache in full)
    with pytest.raises(InputError, match="41 tokens"):
        model.apply({"params": params}, random_tokens(1, 1), full)


def test_a_step_beyond_the_positions_gives_nan_inside_jit():
    model, params, apply = small_model("gpt2")
    states = model.init_state(2)
    length = jnp.array([POSITIONS, POSITIONS - 1])
    states = tuple(cache._replace(length=length) for cache in states)
    logits = apply({"params": params}, random_tokens(2, 1), states).logits
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_documents_may_share_a_row_longer_than_the_positions():
    _, params, apply = small_model("gpt2")
    tokens = random_tokens(1, 60)
    ids = jnp.arange(60)[None] // 30
    packed = apply({"params": params}, tokens, segment_ids=ids).logits[0]
    alone = apply({"params": params}, tokens.reshape(2, 30)).logits
    assert_allclose(packed, alone.reshape(60, -1), rtol=1e-4, atol=1e-4)
