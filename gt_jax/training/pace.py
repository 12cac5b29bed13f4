"""What a part of the model does otherwise than the rest: it warms up later, waits, is amplified."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gt_jax.config import Optim

PARTS = ("rwkv", "mamba", "gate")


def scaled(groups: dict[str, Any], optim: Optim) -> dict[str, Any]:
    """Gradients as `optimizer.join` gives them, Mamba's times optim.mamba_grad_scale."""
    if optim.mamba_grad_scale == 1 or "mamba" not in groups:
        return groups
    scale = optim.mamba_grad_scale
    return groups | {"mamba": jax.tree.map(lambda g: scale * g, groups["mamba"])}


def parts(optim: Optim) -> list[str]:
    """The parts that optim.part_warmup_steps and optim.frozen_steps hold back."""
    held = optim.part_warmup_steps, optim.frozen_steps
    return [part for part in PARTS if any(getattr(steps, part) for steps in held)]


def factors(optim: Optim, count: jax.Array, rate: ArrayLike) -> dict[str, jax.Array]:
    """What the learning rate of each of these parts is multiplied with.

    Args:
        optim: uses lr, part_warmup_steps and frozen_steps.
        count: [] int32, updates made before this one.
        rate: [] the learning rate of this one.

    Returns:
        Part -> min(1, lr (count + 1) / part_warmup_steps / rate), and zero for its first
        frozen_steps updates.
    """

    def factor(part: str) -> jax.Array:
        warmup, frozen = getattr(optim.part_warmup_steps, part), getattr(optim.frozen_steps, part)
        ramp = optim.lr * (count + 1) / max(warmup, 1)
        slower = jnp.minimum(1.0, ramp / jnp.maximum(rate, 1e-30)) if warmup else 1.0
        return jnp.where(count < frozen, 0.0, slower)

    return {part: factor(part) for part in parts(optim)}
