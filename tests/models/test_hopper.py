"""How models call the Hopper kernels, seen without a GPU: what is lowered, what runs twice."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gt_jax.kernels.pallas import devices
from gt_jax.models import make_config, make_model, stream
from tests.kernels.runs import runs_of_kernels

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < devices.OLDEST_JAX, reason="the Pallas kernels need a newer JAX"
)


@pytest.fixture(autouse=True)
def small_steps_as_large_ones(monkeypatch):
    monkeypatch.setattr(stream, "LEAST_NUMBERS", 0)


def trace(layers, remat="none", of=jax.grad):
    """A program of the loss of a model, or of its gradient."""
    config = make_config(
        "gf", vocab_size=8, dim=64, heads=1, state_size=64, layers=layers, dtype="bfloat16",
        impl="mosaic", remat=remat,
    )  # fmt: skip
    model = make_model(config)
    tokens = jnp.zeros((2, 64), jnp.int32)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens).logits ** 2)

    with devices.simulated("lower"):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        return jax.jit(of(loss)).trace(params)


def test_whoever_intercepts_calls_sees_those_of_the_fusion():
    """One kernel joins the branches where nobody looks; an ablation of them must still count."""
    config = make_config(
        "gf", vocab_size=8, dim=64, heads=1, state_size=64, layers=2, dtype="bfloat16",
        impl="mosaic",
    )  # fmt: skip
    model, tokens, seen = make_model(config), jnp.zeros((2, 64), jnp.int32), []

    def look(call, args, kwargs, context):
        if context.method_name == "__call__":
            seen.append((*context.module.path, len(args)))
        return call(*args, **kwargs)

    def kernels():
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return str(jax.make_jaxpr(model.apply)(shapes, tokens)).count("gated_forward")

    with devices.simulated("lower"):
        alone = kernels()
        with nn.intercept_methods(look):
            assert kernels() < alone
    for block in ("blocks_0", "blocks_1"):
        assert (block, "fusion", 4) in seen


def test_layers_share_the_lowering_of_a_kernel():
    def kernels(layers):
        with devices.simulated("lower"):
            lowered = trace(layers, of=lambda loss: loss).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert 0 < kernels(2) == kernels(3)


def test_only_full_remat_runs_the_kernels_forward_pass_again():
    none, dots, full = (
        runs_of_kernels(trace(1, remat).jaxpr) for remat in ("none", "dots", "full")
    )
    forward = [name for name in none if not name.endswith(("gradients", "backward", "_bfloat16"))]
    assert len(forward) == 8 and len(none) == 8 + 8
    # Both norms of the residual stream, and the kernels that store nothing, are one each a block.
    twice = {"residual_norm_forward", "residual_norm_backward"}
    assert none == {name: 1 + (name in twice) for name in none}
    # What reads the norms of heads and of gates computes them again itself (projected.py).
    again = Counter(["token_shift", "causal_conv_forward", "ssd_decay_sums"])
    assert dots == none + again
    assert full == none + Counter({name: none[name] for name in forward})
