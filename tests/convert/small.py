"""Small models with random parameters, stored as ours and as other libraries store them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.convert import LAYOUTS, files, import_model
from gt_jax.convert.layout import write_arrays
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model

VOCAB = 29
MODELS = {
    "rwkv6": ModelConfig(VOCAB, "rwkv6", dim=64, layers=2, heads=2, tie_embeddings=False),
    "rwkv6-states": ModelConfig(
        VOCAB, "rwkv6", dim=64, layers=2, heads=2, tie_embeddings=False, learned_states=True
    ),
    "mamba2": ModelConfig(VOCAB, "mamba2", dim=64, layers=2, state_size=16, tie_embeddings=False),
    "mamba2-tied": ModelConfig(VOCAB, "mamba2", dim=64, layers=2, state_size=16),
}


@functools.cache
def params_of(name):
    """N(0, 0.3) for every parameter, so that no zero hides anything."""
    init = make_model(MODELS[name]).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def save(name, folder, tokenizer=None):
    """Write MODELS[name] as `gt_jax.load` takes it; returns the folder."""
    tokenizer = tokenizer or IdTokenizer(VOCAB)
    checkpoint.save_model(folder, MODELS[name], params_of(name), tokenizer)
    return folder


def arrays_of(name, layout):
    """The tensors of MODELS[name] in a layout, a new dict each time."""
    return write_arrays(LAYOUTS[layout], MODELS[name], params_of(name))


def rwkv_arrays(**changes):
    """The tensors of RWKV-6 with some replaced, or left out where None."""
    arrays = arrays_of("rwkv6", "rwkv-lm") | changes
    return {name: array for name, array in arrays.items() if array is not None}


def config_of(name, layout):
    return LAYOUTS[layout].config(MODELS[name])


def store(name, layout, folder):
    """Write MODELS[name] as the other library would; returns the file or folder."""
    if LAYOUTS[layout].weights is None:
        path = folder / "model.pth"
        files.write(path, arrays_of(name, layout))
        return path
    path = folder / layout
    weights = LAYOUTS[layout].weights
    files.write_folder(path, weights, arrays_of(name, layout), config_of(name, layout))
    return path


def assert_same(params, others):
    """Bit for bit."""
    assert jax.tree.structure(params) == jax.tree.structure(others)
    jax.tree.map(np.testing.assert_array_equal, params, others)


def refuse(source, target, message):
    """Assert that the import fails with one line that matches, and leaves nothing behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as refused:
        import_model(source, target)
    assert "\n" not in str(refused.value)
    assert sorted(target.parent.rglob("*")) == before
