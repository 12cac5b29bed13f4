"""Training a part of a stored model alone (train.tune), the rest frozen.

The trained part is a tree like the parameters, with None in place of what is frozen: gradients,
the optimizer's state and averages are of this tree, so they take memory for the trained part alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gt_jax.models import ModelConfig, make_model

# train.tune -> the last names in the paths of what it trains.
TRAINED = {"state": ("time_state", "init_states")}


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
    """Loaded parameters, with new ones where they have none, as the learned states of a base."""
    return unflatten_dict(flatten_dict(new) | flatten_dict(loaded))


def count(config: ModelConfig, tune: str) -> int:
    """How many numbers of a model train.tune=`tune` trains. Nothing is allocated."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(make_model(config).init, jax.random.key(0), tokens)["params"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(trained(shapes, tune)))


def _is_none(x):
    return x is None
