"""Training a part of a stored model alone (train.tune), the rest frozen.

The trained part is a tree like the parameters, with None in place of what is frozen: gradients,
the optimizer's state and averages are of this tree, so they take memory for the trained part alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gt_jax.config import Train
from gt_jax.models import ModelConfig, make_model
from gt_jax.training import lora

# train.tune -> the last names in the paths of what it trains.
TRAINED = {"state": ("time_state", "init_states"), "lora": (lora.A, lora.B)}


def prepared(params: Any, train: Train, key: jax.Array) -> Any:
    """A model's parameters with what train.tune trains beside them, new from a random key.

    Raises:
        InputError: train.lora fits none of the matrices.
    """
    return lora.added(params, train.lora, key) if train.tune == "lora" else params


def trained(params: Any, tune: str) -> Any:
    """The part of the parameters that train.tune=`tune` trains; all of them for "none"."""
    if tune == "none":
        return params
    chosen = lambda path, leaf: leaf if path[-1].key in TRAINED[tune] else None
    return jax.tree_util.tree_map_with_path(chosen, params)


def joined(part: Any, params: Any) -> Any:
    """The parameters with those of a trained part in their places."""
    return jax.tree.map(lambda x, y: y if x is None else x, part, params, is_leaf=_is_none)


def like(part: Any, params: Any) -> Any:
    """The part of the parameters that another trained part is of."""
    return jax.tree.map(lambda x, y: None if x is None else y, part, params, is_leaf=_is_none)


def completed(loaded: Any, new: Any) -> Any:
    """Loaded parameters, with new ones where they have none: learned states, adapters."""
    return unflatten_dict(flatten_dict(new) | flatten_dict(loaded))


def count(config: ModelConfig, train: Train) -> int:
    """How many numbers train.tune trains of a model. Nothing is allocated.

    Raises:
        InputError: as of `prepared`.
    """

    def init():
        key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        return prepared(make_model(config).init(key, tokens)["params"], train, key)

    shapes = jax.eval_shape(init)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(trained(shapes, train.tune)))


def _is_none(x):
    return x is None
