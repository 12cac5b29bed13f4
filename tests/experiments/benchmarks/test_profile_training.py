"""The profile's count of model FLOPs."""

import jax
import jax.numpy as jnp
import pytest

from gt_jax.models import make_config, make_model
from gt_jax.training.utilization import flops_per_token


def test_flops_are_three_times_those_of_the_forward_program():
    config = make_config("gpt2", vocab_size=65)
    model, tokens = make_model(config), jnp.zeros((1, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    forward = jax.jit(model.apply).lower(params, tokens).cost_analysis()["flops"]
    # XLA also counts what is not a matrix product: norms, softmax, GELU.
    assert flops_per_token(config, 256) == pytest.approx(3 * forward / 256, rel=0.1)


def test_flops_of_a_hybrid_are_parameters_and_states():
    config = make_config("gf-mh", vocab_size=100, dim=64, layers=2, heads=2, state_size=16)
    model = make_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    state = jax.eval_shape(lambda: model.init_state(1))
    elements = sum(block.rwkv.wkv.size + block.mamba.ssm.size for block in state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert flops_per_token(config, 8) == 6 * parameters + 12 * elements
