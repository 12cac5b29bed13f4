"""Outputs replaced before the fusion, against parameters that give the same outputs."""

import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.analysis import ablated_losses, ablations, output_means
from gt_jax.data.batches import Batch
from tests.models.small_models import jit, small_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 3, 9), dtype=np.int32)
BATCHES = Batch(TOKENS[..., :-1], TOKENS[..., 1:], None, np.ones((2, 3), bool))
KINDS = {
    "gf": ("output", "out_proj"),
    "twin-debate": ("output", "out_proj"),
    "rwkv+rwkv": ("output", "output"),
    "legacy-b2": ("ffn_value", "out_proj"),
}


def loss(small, params):
    apply = functools.partial(small.model.apply, method="loss")
    losses = [
        jit(apply)({"params": params}, inputs, targets).nats
        for inputs, targets in zip(BATCHES.inputs, BATCHES.targets)
    ]
    return sum(losses) / BATCHES.targets.size


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_branches_that_say_nothing(kind):
    """Whatever joins the branches: the gate sees what is left. A legacy branch keeps its input."""
    small = small_model(kind, layers=1)
    config, names = small.model.config, small.model.config.branch_names
    means = jax.device_get(jit(functools.partial(output_means, small.model))(small.params, BATCHES))
    found, keep, fill = ablations(config, means)
    measure = jit(functools.partial(ablated_losses, small.model))
    losses = dict(zip(found, measure(small.params, BATCHES, keep, fill)))
    assert_allclose(losses["nothing", "zero", "all"], loss(small, small.params), **CLOSE)
    for what, name, kernel in zip(("RWKV", "Mamba"), names, KINDS[kind]):
        silent = jax.tree.map(np.array, small.params)
        silent["blocks_0"][name][kernel]["kernel"] *= 0
        if name == "rwkv" and config.branch == "legacy":  # it has a second output kernel
            silent["blocks_0"][name]["output"]["kernel"] *= 0
        want = loss(small, silent)
        assert abs(want - losses["nothing", "zero", "all"]) > 1e-3
        assert_allclose(losses[what, "zero", "all"], want, **CLOSE)
        assert_allclose(losses[what, "zero", "block 0"], want, **CLOSE)
        assert losses[what, "mean", "all"] != losses[what, "zero", "all"]


def test_means_are_of_the_outputs_alone():
    small = small_model("gf", layers=1)
    found = jit(functools.partial(output_means, small.model))(small.params, BATCHES)
    apply = jit(functools.partial(small.model.apply, mutable=["activations"]))
    inputs = BATCHES.inputs.reshape(6, -1)
    block = apply({"params": small.params}, inputs)[1]["activations"]["blocks_0"]
    want = [np.mean(block[name][0], axis=(0, 1)) for name in ("rwkv_out", "mamba_out")]
    assert_allclose(found[0], want, rtol=1e-4, atol=1e-5)
