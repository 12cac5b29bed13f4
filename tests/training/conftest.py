"""A small stand-in for a model, quick to compile, and the settings to train it with."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.config import default_config, from_config_dict
from gt_jax.data import Batch
from gt_jax.models import ModelConfig
from gt_jax.training.step import summed_loss

VOCAB, DIM = 11, 8


class Output(NamedTuple):
    logits: Any
    state: Any


class Loss(NamedTuple):
    nats: Any
    state: Any


class Fusion(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        gate = jax.nn.sigmoid(nn.Dense(1)(jnp.concatenate([a, b], -1)))
        self.sow("activations", "gate", gate)
        return gate * a + (1 - gate) * b


class Block(nn.Module):
    """A decayed sum over time beside a plain projection, joined by a gate."""

    @nn.compact
    def __call__(self, x, h):
        def step(h, x_t):
            h = 0.7 * h + x_t
            return h, h

        h, sums = jax.lax.scan(step, h, nn.Dense(DIM, name="rwkv")(x).swapaxes(0, 1))
        x = x + Fusion(name="fusion")(sums.swapaxes(0, 1), nn.Dense(DIM, name="mamba")(x))
        return nn.LayerNorm()(x), h


class ToyModel(nn.Module):
    """Same interface as gt_jax.models: tokens and state in, logits or loss and state out."""

    layers: int = 2
    config: Any = ModelConfig(VOCAB)  # nothing but its vocabulary matters here

    @nn.compact
    def __call__(self, tokens, state=None, *, segment_ids=None, rwkv_drop=None):
        state = self.init_state(tokens.shape[0]) if state is None else state
        vocab = self.config.vocab_size
        x = nn.Embed(vocab, DIM, name="embedding")(tokens)
        after = []
        for layer in range(self.layers):
            x, h = Block(name=f"blocks_{layer}")(x, state[layer])
            after.append(h)
        return Output(nn.Dense(vocab, use_bias=False, name="head")(x), tuple(after))

    def loss(self, tokens, targets, state=None, **options):
        output = self(tokens, state, **options)
        return Loss(summed_loss(output.logits, targets), output.state)

    def init_state(self, batch_size):
        return (jnp.zeros((batch_size, DIM)),) * self.layers


@pytest.fixture(scope="session")
def toy():
    return ToyModel()


@pytest.fixture(scope="session")
def make_config():
    """make_config(**{"optim.lr": 3e-4, ...}) -> Config of a short run on [8, 6] batches."""

    def make(**fields):
        config = default_config()
        small = {"train.batch_size": 8, "train.seq_len": 6, "train.steps": 20}
        config.update_from_flattened_dict(
            small | {"optim.lr": 1e-3, "optim.warmup_steps": 2} | fields
        )
        return from_config_dict(config)

    return make


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(seed, rows=8, length=6) -> Batch of random tokens, with some targets left out."""

    def make(seed, rows=8, length=6):
        rng = np.random.default_rng(seed)
        inputs = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
        targets = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
        targets[rng.random((rows, length)) < 0.2] = -1
        return Batch(inputs, targets, None, np.ones(rows, bool))

    return make
