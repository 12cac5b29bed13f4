"""Small models with lively parameters, one for every kind of block, shared by the model tests."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.models import LanguageModel, ModelConfig, make_model

KINDS = {
    "gf": {"fusion": "gf", "gate_init": 0.3},
    "gru": {"fusion": "gru"},
    "twin-debate": {"fusion": "mingru", "residual": "mamba", "post_norm": True, "layers": 1}
    | {"feed_forward": False},
    "rwkv+rwkv": {"branches": "rwkv+rwkv"},
    "mamba+mamba": {"branches": "mamba+mamba"},
    "legacy-a": {"branch": "legacy", "fusion": "ws"},
    "legacy-b1": {"branch": "legacy", "legacy_wkv": "b1", "fusion": "rf"},
    "legacy-b2": {"branch": "legacy", "legacy_wkv": "b2", "fusion": "hy"},
    "legacy-c": {"branch": "legacy", "legacy_wkv": "c", "fusion": "hgf"},
    "rwkv6": {"architecture": "rwkv6", "tie_embeddings": False},
    "rwkv6-legacy": {"architecture": "rwkv6", "branch": "legacy"},
    "mamba2": {"architecture": "mamba2"},
    "gpt2": {"architecture": "gpt2", "max_positions": 40},
    "gpt1": {"architecture": "gpt1", "max_positions": 40},
}


class Small(NamedTuple):
    """A model, its parameters, and its jitted application."""

    model: LanguageModel
    params: dict
    apply: callable


def small_config(**fields):
    """Width 32, 2 layers, 2 heads, 16 state channels, 17 tokens."""
    defaults = {"vocab_size": 17, "dim": 32, "layers": 2, "heads": 2, "state_size": 16}
    return ModelConfig(**(defaults | fields))


def jit(function):
    """jax.jit compiling quickly rather than well: compilation is what these tests cost."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def lively_parameters(module, *inputs, seed=1):
    """N(0, 0.3) for every parameter of a module, so that no zero hides anything.

    Drawn by NumPy: JAX would compile a program for every shape.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32))
    return jax.tree.map(draw, shapes)


@functools.cache
def small_model(kind, **fields):
    """The Small of KINDS[kind] with other fields; cached, so each is compiled once per shape."""
    model = make_model(small_config(**(KINDS[kind] | fields)))
    return Small(model, lively_parameters(model, random_tokens(1, 1)), jit(model.apply))


def random_tokens(batch, length, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 17)
