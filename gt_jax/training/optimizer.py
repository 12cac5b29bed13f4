"""AdamW, Muon and schedule-free AdamW: decay on weight matrices alone, a rate for each part.

Whichever it is, gradients come as `join` gives them, and a step that is not finite leaves no trace.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gt_jax.config import Optim
from gt_jax.training import pace, tuning

# Name in a path -> label. Everything else (embedding, feed-forward, norms, head) is "rest".
LABELS = {"rwkv": "rwkv", "mamba": "mamba", "fusion": "gate"}

# What is no projection, though some of it is a matrix: embeddings, fusions, RWKV's token-shift
# mixes and decays with their low-rank factors, Mamba's depthwise convolution, learned states.
NOT_DECAYED = ("embedding", "positions", "fusion", "time_", "conv", "init_states")

# Size of an update of Muon's, root mean square before the learning rate, near that of AdamW's
# (Liu et al. 2025, arXiv:2502.16982): the two then share their rate and their decay.
_MUON_RMS = 0.2

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


def is_projection(path: tuple[Any, ...], value: jax.Array) -> bool:
    """Whether Muon is for a parameter: a matrix inside a block that weight decay acts on."""
    return is_decayed(path, value) and value.ndim == 2 and "head" not in _names(path)


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ..., steps - 1.

    Linear warm-up, lr * (n + 1) / warmup_steps, so that the first update moves; then by
    optim.schedule from lr to min_lr_ratio * lr at the last update: on a cosine, on a line, not at
    all, or on a line through the last decay_steps alone ("wsd": warm-up, stable, decay).
    """

    def schedule(count):  # of optim's numbers, which may be tracers
        last, begin = jnp.maximum(steps - 1, optim.warmup_steps + 1), optim.warmup_steps
        warm = (count + 1) / jnp.maximum(optim.warmup_steps, 1)
        if optim.schedule == "wsd":
            begin = jnp.maximum(last - (optim.decay_steps or max(steps // 5, 1)), begin)
        progress = jnp.clip((count - begin) / (last - begin), 0, 1)
        share = {
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": lambda: 1 - progress,
            "wsd": lambda: 1 - progress,
            "constant": lambda: 1.0,
        }[optim.schedule]()
        return optim.lr * jnp.minimum(warm, optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)

    return schedule


def make_optimizer(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """The optimizer optim.name, with decoupled decay (lr * weight_decay) and rates by part.

    Its gradients are clipped ones as `join` gives them, its updates a tree like the parameters.
    update(..., finite=False) leaves no trace: the state stays as it is and updates are zero.
    update(..., done=count) of updates made before this one holds parts back, see `pace.factors`.
    Moments are stored in optim.moments_dtype and computed in float32.
    """
    if optim.name == "schedule_free":  # averages what was held back
        return _schedule_free(optim, schedule)
    return _paced({"adamw": _adamw, "muon": _muon}[optim.name](optim, schedule), optim, schedule)


def is_averaged(opt_state: Any, average: Any = None) -> bool:
    """Whether `evaluated` gives other parameters than those that gradients are taken at."""
    return average is not None or isinstance(opt_state, optax.contrib.ScheduleFreeState)


def evaluated(params: Any, opt_state: Any, average: Any = None) -> Any:
    """The parameters that a run evaluates, samples from and exports.

    Args:
        params: those that gradients are taken at.
        opt_state: of `make_optimizer`.
        average: the mean of optim.ema, if there is one; like opt_state, of what is trained.

    Returns:
        The average; else schedule-free's own; else params.
    """
    if average is not None:
        return tuning.joined(average, params)
    if isinstance(opt_state, optax.contrib.ScheduleFreeState):
        part = tuning.like(opt_state.z, params)
        average = optax.contrib.schedule_free_eval_params(opt_state, part)
        return tuning.joined(average, params)
    return params


def update_average(average: Any, params: Any, decay: float, count: jax.Array) -> Any:
    """The mean of optim.ema after one more update.

    After n updates, sum_i decay^(n - i) params_i over the sum of these weights: the parameters
    before the first update have no part in it (optax.ema with debias, of the parameters).

    Args:
        average: the mean before, a tree of arrays.
        params: after the update.
        decay: above 0 and below 1.
        count: [] int32, updates done, this one included.
    """
    # 1 - decay^count would keep few digits of a decay near 1.
    weight = (1 - decay) / -jnp.expm1(count * math.log(decay))
    return jax.tree.map(lambda old, new: old + weight * (new - old), average, params)


def _paced(
    tx: optax.GradientTransformationExtraArgs, optim: Optim, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that holds parts back; the very same one if there is none to hold back."""
    if not pace.parts(optim):
        return tx

    def update(updates, state, params=None, *, done: Any = None, **more):
        found, after = tx.update(updates, state, params, **more)
        factors = pace.factors(optim, done, schedule(done))
        of = lambda path: factors.get(label(path), 1.0)
        return jax.tree_util.tree_map_with_path(lambda path, u: u * of(path), found), after

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _factors(optim: Optim) -> dict:
    """Label -> what its learning rate is multiplied with."""
    multipliers = optim.lr_multipliers
    return {"rwkv": multipliers.rwkv, "mamba": multipliers.mamba, "gate": multipliers.gate}


def _adamw(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """AdamW on joined leaves. Whether an update is finite is decided where moments are computed: a
    choice between old and new ones afterwards would read and write them all again."""
    stored, factors = jnp.dtype(optim.moments_dtype), _factors(optim)

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
        direction_of = lambda m, n: m / unbias_mu / (jnp.sqrt(n / unbias_nu) + optim.eps)
        directions = _stored_once(jax.tree.map(direction_of, mu, nu))
        down, directions = jax.tree.map(lambda x: jnp.where(finite, x, 0), (-rate, directions))

        def update_of(path, direction, value):
            if is_decayed(path, value):
                direction = direction + optim.weight_decay * value
            factor = factors.get(label(path), 1.0)
            if not (isinstance(factor, float) and factor == 1):
                direction = factor * direction
            return down * direction

        updates = jax.tree_util.tree_map_with_path(update_of, split(directions, params), params)
        mu, nu = jax.tree.map(lambda x: x.astype(stored), (mu, nu))
        return updates, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _stored_once(groups: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """Arrays as `join` gives them, each vector of small leaves computed once on a GPU.

    XLA moves all parameters of one shape in one kernel if that kernel does something to the whole
    vector, and each in a kernel of its own if they only read parts of it.
    """
    if jax.default_backend() != "gpu":
        return groups
    only = lambda arrays: {key: x for key, x in arrays.items() if key == "joined"}
    vectors = jax.lax.optimization_barrier({name: only(x) for name, x in groups.items()})
    return {name: arrays | vectors[name] for name, arrays in groups.items()}


class MuonState(NamedTuple):
    """State of Muon: optax's of the projections by shape, and AdamW's of the rest."""

    projections: Any  # optax.contrib.MuonState
    rest: Any  # optax.ScaleByAdamState


def _muon(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan 2024) on projections: orthogonalised Nesterov momentum, of AdamW's size.

    Projections of one shape are orthogonalised together: a few large products for many small ones.
    """
    stored, factors = jnp.dtype(optim.moments_dtype), _factors(optim)
    rest = _adamw(optim, schedule)
    orthogonal = optax.contrib.scale_by_muon(
        beta=optim.muon_momentum,
        mu_dtype=stored,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), tree
        ),
    )

    def init(params):
        projections, others = _parted(params, params)
        return MuonState(orthogonal.init(_stacked(projections)), rest.init(others))

    def update(updates, state, params=None, *, finite=True, **_):
        rate = jnp.asarray(schedule(state.rest.count))
        values, other_values = _parted(params, params)
        grads, others = _parted(split(updates, params), params)
        moved, adam = rest.update(join(others), state.rest, other_values, finite=finite)
        before = state.projections
        whole = before._replace(mu=jax.tree.map(lambda x: x.astype(jnp.float32), before.mu))
        directions, after = orthogonal.update(_stacked(grads), whole)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

        def update_of(path, direction, value):
            direction *= _MUON_RMS * max(value.shape) ** 0.5
            step = -rate * factors.get(label(path), 1.0) * (direction + optim.weight_decay * value)
            return jnp.where(finite, step, 0)

        directions = _unstacked(directions, values)
        turned = jax.tree_util.tree_map_with_path(update_of, directions, values)
        both = jax.tree.map(
            lambda a, b: b if a is None else a, turned, moved, is_leaf=lambda x: x is None
        )
        return both, MuonState(after, adam)

    return optax.GradientTransformationExtraArgs(init, update)


def _schedule_free(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """optax's schedule-free (Defazio et al. 2024, arXiv:2405.15682) around AdamW without b1."""
    adamw = _paced(_adamw(dataclasses.replace(optim, b1=0.0), schedule), optim, schedule)
    free = optax.contrib.schedule_free(adamw, schedule, b1=optim.b1)

    def update(updates, state, params=None, *, finite=True, **more):
        found, after = free.update(updates, state, params, finite=finite, **more)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return jax.tree.map(lambda u: jnp.where(finite, u, 0), found), after

    return optax.GradientTransformationExtraArgs(free.init, update)


def _stacked(tree: Any) -> dict[str, jax.Array]:
    """ "64x128" -> [n, 64, 128], all matrices of that shape in a tree."""
    groups = {}
    for leaf in jax.tree.leaves(tree):
        groups.setdefault("x".join(map(str, leaf.shape)), []).append(leaf)
    return {shape: jnp.stack(leaves) for shape, leaves in groups.items()}


def _unstacked(stacks: Any, like: Any) -> Any:
    """Undo `_stacked` of a tree like `like`."""
    left = {shape: iter(stack) for shape, stack in stacks.items()}
    return jax.tree.map(lambda leaf: next(left["x".join(map(str, leaf.shape))]), like)


def _parted(tree: Any, like: Any) -> tuple[Any, Any]:
    """Projections, and all else, of a tree like `like`: each with None for the leaves it lacks."""
    chosen = jax.tree_util.tree_map_with_path(is_projection, like)
    return (
        jax.tree.map(lambda x, is_one: x if is_one else None, tree, chosen),
        jax.tree.map(lambda x, is_one: None if is_one else x, tree, chosen),
    )


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


def norms(groups: dict[str, dict[str, jax.Array]], are_cut: bool = False) -> dict[str, jax.Array]:
    """Global norm of what bears each label, of a tree as `join` gives it; its arrays may be cut."""
    if are_cut:  # between devices, which would gather the sums of their rows
        return {name: optax.tree.norm(arrays) for name, arrays in groups.items()}
    # Sums along rows first: a sum of each array's own sum is three small kernels an array on a GPU.
    rows = lambda x: jnp.sum(jnp.square(x), axis=-1).ravel()
    total = lambda arrays: jnp.sum(jnp.concatenate([*map(rows, arrays.values())]))
    return {name: jnp.sqrt(total(arrays)) for name, arrays in groups.items()}


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
