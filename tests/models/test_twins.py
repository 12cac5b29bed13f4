"""Two branches of one kind: what they are called, and that each does its part."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.analysis import memories
from gt_jax.errors import InputError
from gt_jax.models.fusion import Gate
from gt_jax.models.mamba2 import Mamba2
from gt_jax.models.rwkv6 import TimeMix
from gt_jax.training.optimizer import label
from tests.models.small_models import jit, random_tokens, small_config, small_model

MIXERS = {"rwkv": lambda c: TimeMix(c, 0), "mamba": Mamba2}


def test_the_ordinary_hybrid_keeps_its_names():
    block = small_model("gf").params["blocks_0"]
    assert set(block) == {"mixer_norm", "rwkv", "mamba", "fusion", "ffn_norm", "ffn"}


@pytest.mark.parametrize("kind", MIXERS)
def test_block_fuses_two_mixers_of_one_kind(kind):
    """Against the mixers and the gate applied one by one; the two have parameters of their own."""
    model, params, _ = small_model(f"{kind}+{kind}", layers=1)
    block = params["blocks_0"]
    _, sown = jit(lambda tokens: model.apply({"params": params}, tokens, mutable="activations"))(
        random_tokens(2, 9)
    )
    sown = {name: x[0] for name, x in sown["activations"]["blocks_0"].items() if name != "fusion"}
    x = np.asarray(params["embedding"]["embedding"])[random_tokens(2, 9)]
    n = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * block["mixer_norm"]["scale"]
    mixer = jit(lambda weights: MIXERS[kind](model.config).apply({"params": weights}, n)[0])
    first, second = mixer(block[kind]), mixer(block[f"{kind}_2"])
    assert np.abs(first - second).max() > 0.1
    assert_allclose(sown["rwkv_out"], first, rtol=1e-4, atol=1e-4)
    assert_allclose(sown["mamba_out"], second, rtol=1e-4, atol=1e-4)
    fused, _ = Gate(model.config).apply({"params": block["fusion"]}, first, second)
    assert_allclose(sown["fused"], fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MIXERS)
def test_both_branches_are_labelled_and_remember(kind):
    model, params, _ = small_model(f"{kind}+{kind}")
    labels = {label(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert labels == {kind, "gate", "rest"}
    assert set(memories(model.init_state(1)[0])) == {kind, f"{kind}_2"}


def test_widths_are_those_of_the_branches_there_are():
    small_config(branches="rwkv+rwkv", dim=48)
    small_config(branches="mamba+mamba", heads=3)
    with pytest.raises(InputError, match=r"model\.dim=48 must be a multiple of 32"):
        small_config(branches="mamba+mamba", dim=48)


def test_dropping_rwkv_needs_another_branch():
    model, params, _ = small_model("rwkv+rwkv")
    with pytest.raises(InputError, match=r"need .* with RWKV beside Mamba, not 'rwkv\+rwkv'"):
        model.apply({"params": params}, random_tokens(1, 3), rwkv_drop=0.1)
