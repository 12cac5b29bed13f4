"""What a hybrid block adds up: residual paths, the twin-debate block."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.errors import InputError
from gt_jax.models import FUSIONS
from gt_jax.models.hybrid import Block
from tests.models.small_models import jit, lively_parameters, small_config

X = jax.random.normal(jax.random.key(0), (2, 9, 32))


def block(**fields):
    """A block's config, lively parameters, output and what it recorded."""
    module = Block(small_config(**fields), 0)
    params = lively_parameters(module, X, None, None, None)
    apply = jit(lambda p: module.apply({"params": p}, X, None, None, None, mutable="activations"))
    (y, _), sown = apply(params)
    return module.config, params, y, sown["activations"]


@pytest.mark.parametrize("residual", ["none", "mamba", "both"])
@pytest.mark.parametrize("fusion", ["gf", "glu"])
def test_residual_paths_add_the_block_input_before_the_fusion(fusion, residual):
    """GLU is told that input besides."""
    config, params, y, sown = block(fusion=fusion, residual=residual, feed_forward=False)
    n = X / np.sqrt(np.square(X).mean(-1, keepdims=True) + 1e-6) * params["mixer_norm"]["scale"]
    assert_allclose(sown["block_input"][0], n, rtol=1e-5, atol=1e-5)
    rwkv, mamba = sown["rwkv_out"][0], sown["mamba_out"][0]
    rwkv, mamba = rwkv + n * (residual == "both"), mamba + n * (residual != "none")
    more = {"block_input": n} if fusion == "glu" else {}
    fused, _ = FUSIONS[fusion](config).apply({"params": params["fusion"]}, rwkv, mamba, **more)
    assert_allclose(y, X + fused, rtol=1e-4, atol=1e-4)


def test_twin_debate_block_adds_a_normed_update_and_has_no_feed_forward():
    fields = {"fusion": "mingru", "residual": "mamba", "feed_forward": False}
    _, params, y, sown = block(**fields, post_norm=True)
    assert set(params) == {"mixer_norm", "rwkv", "mamba", "fusion", "fused_norm"}
    fused = sown["fused"][0]
    size = np.sqrt(np.square(fused).mean(-1, keepdims=True) + 1e-2)
    assert_allclose(y, X + fused / size * params["fused_norm"]["scale"], rtol=1e-4, atol=1e-4)


def test_silent_branches_still_contribute_what_they_read():
    """The weight of Mamba's path times its input, not zero."""
    module = Block(small_config(residual="mamba", fusion="ws", feed_forward=False), 0)
    params = lively_parameters(module, X, None, None, None)
    params["mamba"]["out_proj"]["kernel"] *= 0
    params["rwkv"]["output"]["kernel"] *= 0
    y, _ = jit(lambda p: module.apply({"params": p}, X, None, None, None))(params)
    n = X / np.sqrt(np.square(X).mean(-1, keepdims=True) + 1e-6) * params["mixer_norm"]["scale"]
    assert_allclose(y, X + (1 - params["fusion"]["alpha"]) * n, rtol=1e-4, atol=1e-4)


def test_the_input_is_not_added_twice():
    with pytest.raises(InputError, match=r"^model\.residual='both' adds the input twice"):
        small_config(residual="both", branch="legacy")
    small_config(residual="both", branch="legacy", legacy_wkv="c")
