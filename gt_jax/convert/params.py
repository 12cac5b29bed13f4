"""Parameters as {path: array}, the path such as "blocks_0/rwkv/key/kernel": read, new, written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gt_jax import checkpoint
from gt_jax.convert import files
from gt_jax.models import ModelConfig, make_model


class Stored(NamedTuple):
    """A model in a folder: its configuration, parameters [NumPy, float32] and tokenizer."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    tokenizer: Any


def read(path: str | Path) -> Stored:
    """What `gt_jax.load` takes. Raises InputError as it does."""
    model, params, tokenizer = checkpoint.load(path)
    return Stored(model.config, _flat(jax.device_get(params)), tokenizer)


def write(target: str | Path, stored: Stored) -> None:
    """Make the folder `target` for `gt_jax.load`, whole or not at all."""
    with files.new(target) as unfinished:
        params = unflatten_dict(stored.params, sep="/")
        checkpoint.save_model(unfinished, stored.config, params, stored.tokenizer)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter. Nothing is allocated."""
    return {path: x.shape for path, x in jax.eval_shape(_init(config), jax.random.key(0)).items()}


def new(config: ModelConfig, seed: int, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The parameters that a new model would have, where wanted(path); only they are made."""

    def init(key):
        return {path: x for path, x in _init(config)(key).items() if wanted(path)}

    return jax.device_get(jax.jit(init)(jax.random.key(seed)))


def _init(config):
    init = make_model(config).init
    return lambda key: _flat(init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def _flat(params) -> dict[str, Any]:
    return cast(dict[str, Any], flatten_dict(params, sep="/"))
