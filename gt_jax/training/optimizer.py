"""AdamW: warm-up and cosine, decay on weight matrices alone, a learning rate for each part."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from gt_jax.config import Multipliers, Optim

# Path piece -> label. Everything else (embedding, feed-forward, norms, head) is "rest".
LABELS = {"rwkv": "rwkv", "mamba": "mamba", "fusion": "gate"}

# What is no projection, though some of it is a matrix: embeddings, fusions, RWKV's token-shift
# mixes and decays with their low-rank factors, Mamba's depthwise convolution.
NOT_DECAYED = ("embedding", "positions", "fusion", "time_", "conv")


def label(path: tuple[Any, ...]) -> str:
    """The part of the model a parameter path belongs to: "rwkv", "mamba", "gate" or "rest"."""
    pieces = [piece.removesuffix("_2") for piece in _pieces(path)]  # a second branch of the kind
    return next((LABELS[piece] for piece in pieces if piece in LABELS), "rest")


def is_decayed(path: tuple[Any, ...], value: jax.Array) -> bool:
    """Whether weight decay acts on a parameter: on matrices, unless a piece of its name says no."""
    return value.ndim >= 2 and not any(
        name in piece for piece in _pieces(path) for name in NOT_DECAYED
    )


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ..., steps - 1.

    Linear warm-up, lr * (n + 1) / warmup_steps, so that the first update moves; then a cosine from
    lr to min_lr_ratio * lr at the last update.
    """

    def schedule(count):  # of optim's numbers, which may be tracers
        last = jnp.maximum(steps - 1, optim.warmup_steps + 1)
        warm = (count + 1) / jnp.maximum(optim.warmup_steps, 1)
        progress = jnp.clip((count - optim.warmup_steps) / (last - optim.warmup_steps), 0, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return optim.lr * jnp.minimum(warm, optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)

    return schedule


def make_optimizer(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam, decoupled decay (lr * weight_decay), learning rate by part.

    Its gradients are clipped ones as `join` gives them, its updates a tree like the parameters.
    """
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)

    def decay_mask(params):
        return jax.tree_util.tree_map_with_path(is_decayed, params)

    return optax.chain(
        optax.GradientTransformation(lambda params: adam.init(join(params)), adam.update),
        optax.stateless(cast(Callable[..., Any], split)),
        optax.add_decayed_weights(optim.weight_decay, decay_mask),
        _scale_by_label(optim.lr_multipliers),
        optax.scale_by_learning_rate(schedule),
    )


def join(tree: Any) -> dict[str, jax.Array]:
    """A vector for each label that occurs, of all leaves that bear it.

    What is done to hundreds of gradients and moments alike then takes a few large operations.
    """
    groups = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        groups.setdefault(label(path), []).append(leaf.ravel())
    vectors = {name: jnp.concatenate(leaves) for name, leaves in groups.items()}
    # Once, and not again in everything that reads it.
    return jax.lax.optimization_barrier(vectors)


def split(vectors: dict[str, jax.Array], like: Any) -> Any:
    """Undo `join` of a tree like `like`."""
    starts = dict.fromkeys(vectors, 0)

    def take(path, leaf):
        name = label(path)
        start = starts[name]
        starts[name] += leaf.size
        return vectors[name][start : starts[name]].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(take, like)


def norms_by_label(tree: Any) -> dict[str, jax.Array]:
    """Global norm of the leaves of each label that occurs."""
    return jax.tree.map(optax.tree.norm, join(tree))


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients of global norm `norm`, scaled to `limit` where they exceed it; 0 is no limit."""
    if not limit:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads)


def _scale_by_label(multipliers: Multipliers) -> optax.GradientTransformation:
    factors = {"rwkv": multipliers.rwkv, "mamba": multipliers.mamba, "gate": multipliers.gate}
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(
            lambda path, update: update * factors.get(label(path), 1.0), updates
        )
    )


def _pieces(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
