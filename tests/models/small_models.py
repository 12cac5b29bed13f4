"""Small models with lively parameters, one for every kind of block, shared by the model tests."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.models import LanguageModel, ModelConfig, make_model

KINDS = {
    "gf": {"fusion": "gf", "gate_init": 0.3},
    "hy": {"fusion": "hy"},
    "hgf": {"fusion": "hgf"},
    "gru": {"fusion": "gru"},
    "legacy-a": {"branch": "legacy", "fusion": "ws"},
    "legacy-b1": {"branch": "legacy", "legacy_wkv": "b1", "fusion": "rf"},
    "legacy-b2": {"branch": "legacy", "legacy_wkv": "b2", "fusion": "cp"},
    "legacy-c": {"branch": "legacy", "legacy_wkv": "c"},
    "rwkv6": {"architecture": "rwkv6", "tie_embeddings": False},
    "rwkv6-legacy": {"architecture": "rwkv6", "branch": "legacy"},
    "mamba2": {"architecture": "mamba2"},
    "gpt2": {"architecture": "gpt2", "max_positions": 48},
    "gpt1": {"architecture": "gpt1", "max_positions": 48},
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


def lively(params, seed=1):
    """Every parameter moved from its init, so that zeros hide nothing."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def small_model(kind, **fields):
    """The Small of KINDS[kind] with other fields; cached, so each is compiled once per shape."""
    model = make_model(small_config(**(KINDS[kind] | fields)))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return Small(model, lively(params), jax.jit(model.apply))


def random_tokens(batch, length, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 17)
