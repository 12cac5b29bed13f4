"""AdamW: warm-up and cosine, decay on weight matrices alone, a learning rate for each part."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gt_jax.config import Optim

# Name in a path -> label. Everything else (embedding, feed-forward, norms, head) is "rest".
LABELS = {"rwkv": "rwkv", "mamba": "mamba", "fusion": "gate"}

# What is no projection, though some of it is a matrix: embeddings, fusions, RWKV's token-shift
# mixes and decays with their low-rank factors, Mamba's depthwise convolution.
NOT_DECAYED = ("embedding", "positions", "fusion", "time_", "conv")

# Numbers in a leaf from which on it is cheaper for a GPU to start a kernel for it than to copy it.
# On an H200 a step with all leaves in vectors takes as long (gf_mh_base, within noise), and longer
# to compile.
_LARGE = 2**18


def label(path: tuple[Any, ...]) -> str:
    """The part of the model a parameter path belongs to: "rwkv", "mamba", "gate" or "rest"."""
    names = [name.removesuffix("_2") for name in _names(path)]  # a second branch of the kind
    return next((LABELS[name] for name in names if name in LABELS), "rest")


def is_decayed(path: tuple[Any, ...], value: jax.Array) -> bool:
    """Whether weight decay acts on a parameter: on matrices, unless a name in its path says no."""
    return value.ndim >= 2 and not any(
        part in name for name in _names(path) for part in NOT_DECAYED
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


def make_optimizer(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Adam, decoupled decay (lr * weight_decay), learning rate by part.

    Its gradients are clipped ones as `join` gives them, its updates a tree like the parameters.
    update(..., finite=False) leaves no trace: the state stays as it is and updates are zero. That
    is decided where moments are computed: a choice between old and new ones afterwards would read
    and write them all again. Moments are stored in optim.moments_dtype and computed in float32.
    """
    stored = jnp.dtype(optim.moments_dtype)
    multipliers = optim.lr_multipliers
    factors = {"rwkv": multipliers.rwkv, "mamba": multipliers.mamba, "gate": multipliers.gate}

    def init(params):
        shapes = jax.eval_shape(join, params)
        mu, nu = (jax.tree.map(lambda x: jnp.zeros(x.shape, stored), shapes) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None, *, finite=True, **_):
        def moment(decay, old, new):
            old = old.astype(new.dtype)
            return jnp.where(finite, decay * old + (1 - decay) * new, old)

        mu = jax.tree.map(lambda old, g: moment(optim.b1, old, g), state.mu, updates)
        nu = jax.tree.map(lambda old, g: moment(optim.b2, old, g * g), state.nu, updates)
        rate, count = jnp.asarray(schedule(state.count)), state.count + 1
        unbias_mu, unbias_nu = 1 - optim.b1**count, 1 - optim.b2**count
        directions = jax.tree.map(
            lambda m, n: m / unbias_mu / (jnp.sqrt(n / unbias_nu) + optim.eps), mu, nu
        )

        def update_of(path, direction, value):
            if is_decayed(path, value):
                direction += optim.weight_decay * value
            step = -rate * (factors.get(label(path), 1.0) * direction)
            return jnp.where(finite, step, 0)

        updates = jax.tree_util.tree_map_with_path(update_of, split(directions, params), params)
        mu, nu = jax.tree.map(lambda x: x.astype(stored), (mu, nu))
        return updates, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def join(tree: Any) -> dict[str, dict[str, jax.Array]]:
    """Label -> {"joined": a vector of all small leaves that bear it, path: a large leaf, ...}.

    What is done to hundreds of gradients and moments alike then takes a few large operations.
    """
    groups, small = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = label(path)
        if leaf.size < _LARGE:
            small.setdefault(name, []).append(leaf.ravel())
        else:
            groups.setdefault(name, {})["/".join(_names(path))] = leaf
    vectors = {name: jnp.concatenate(leaves) for name, leaves in small.items()}
    # Once, and not again in everything that reads it.
    for name, vector in jax.lax.optimization_barrier(vectors).items():
        groups.setdefault(name, {})["joined"] = vector
    return groups


def split(groups: dict[str, dict[str, jax.Array]], like: Any) -> Any:
    """Undo `join` of a tree like `like`."""
    starts = dict.fromkeys(groups, 0)

    def take(path, leaf):
        name = label(path)
        if leaf.size >= _LARGE:
            return groups[name]["/".join(_names(path))]
        start = starts[name]
        starts[name] += leaf.size
        return groups[name]["joined"][start : starts[name]].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(take, like)


def norms(groups: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Global norm of what bears each label, of a tree as `join` gives it."""
    return {name: optax.tree.norm(arrays) for name, arrays in groups.items()}


def norms_by_label(tree: Any) -> dict[str, jax.Array]:
    """Global norm of the leaves of each label that occurs."""
    return norms(join(tree))


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients of global norm `norm`, scaled to `limit` where they exceed it; 0 is no limit."""
    if not limit:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads)


def _names(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
