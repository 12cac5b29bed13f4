"""What a part of the model does otherwise than the rest: it warms up later, waits, is amplified."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gt_jax.config import Optim
from gt_jax.training.optimizer import label

PARTS = ("rwkv", "mamba", "gate")


def scaled(groups: dict[str, Any], optim: Optim) -> dict[str, Any]:
    """Gradients as `optimizer.join` gives them, Mamba's times optim.mamba_grad_scale."""
    if optim.mamba_grad_scale == 1 or "mamba" not in groups:
        return groups
    scale = optim.mamba_grad_scale
    return groups | {"mamba": jax.tree.map(lambda g: scale * g, groups["mamba"])}


def paced(updates: Any, optim: Optim, count: jax.Array, rate: ArrayLike) -> Any:
    """Updates of an optimizer, held back where a part warms up longer or waits.

    Args:
        updates: a tree like the parameters.
        optim: uses lr, part_warmup_steps and frozen_steps.
        count: [] int32, updates made before this one.
        rate: [] the learning rate that the updates were made with.

    Returns:
        The updates of a part times min(1, lr (count + 1) / part_warmup_steps / rate), and zero for
        its first frozen_steps updates; the very same tree if no part is held back.
    """
    factors = {}
    for part in PARTS:
        warmup, frozen = getattr(optim.part_warmup_steps, part), getattr(optim.frozen_steps, part)
        if warmup or frozen:
            ramp = optim.lr * (count + 1) / max(warmup, 1)
            factor = jnp.minimum(1.0, ramp / jnp.maximum(rate, 1e-30)) if warmup else 1.0
            factors[part] = jnp.where(count < frozen, 0.0, factor)
    if not factors:
        return updates
    return jax.tree_util.tree_map_with_path(
        lambda path, u: u * factors[label(path)].astype(u.dtype) if label(path) in factors else u,
        updates,
    )
