"""What a document begins with: zero, a learned state, or what survives of the one before.

model.learned_states: it begins with the learned state of each recurrence.

model.rwkv_carry: where a document starts, the state of RWKV-6 is multiplied by it, not by zero.

model.mamba_reset: Mamba's state also starts anew where the topic shifts. Two running means of the
block's input, over about 16 and 256 tokens, follow the topic; the shift is 1 - their cosine, and a
reset falls on a token that lifts it above the threshold. Both look at the past alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.kernels.segments import resets
from gt_jax.models import rwkv6, starts
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import segment_index
from gt_jax.models.scans import linear_scan

_TOKENS = (16, 256)  # that the fast and the slow mean forget to 1 / e in


class TopicState(NamedTuple):
    """Means [B, 2 D] float32 of a block's input, fast and slow; above [B] float32, 1 or 0."""

    means: jax.Array
    above: jax.Array


def first_state(config: ModelConfig, params: Any, zeros: Any) -> Any:
    """A model's state before any token, which calls with state=None begin with.

    Args:
        config: the ModelConfig.
        params: of the model.
        zeros: of `model.init_state`, rows included.

    Returns:
        The zeros; with model.learned_states, the recurrences have their learned states.
    """
    if not config.learned_states:
        return zeros

    def learned(mixer, weights):
        if isinstance(mixer, rwkv6.TimeMixState):
            return mixer._replace(wkv=starts.repeated(weights["time_state"], len(mixer.wkv)))
        return mixer._replace(ssm=starts.repeated(weights["init_states"], len(mixer.ssm)))

    blocks = []
    for layer, block in enumerate(zeros[: config.layers]):
        weights = params[f"blocks_{layer}"]
        if config.architecture == "hybrid":
            names = zip(("rwkv", "mamba"), config.branch_names)
            of_branches = {at: learned(getattr(block, at), weights[name]) for at, name in names}
            blocks.append(block._replace(**of_branches))
        elif config.architecture == "rwkv6":
            blocks.append(block._replace(rwkv=learned(block.rwkv, weights["rwkv"])))
        else:
            blocks.append(learned(block, weights["mamba"]))
    return (*blocks, *zeros[config.layers :])


def start_documents(config: ModelConfig, params: Any, state: Any, begins: jax.Array) -> Any:
    """A model's state before rows of which some start a document.

    Args:
        config: the ModelConfig.
        params: of the model.
        state: as `Output.state`, or None.
        begins: [B] bool, the rows that start a document.

    Returns:
        The state; in those rows `first_state`, but for what model.rwkv_carry keeps.
    """
    if state is None:
        return None
    if config.learned_states:
        first = first_state(config, params, jax.tree.map(jnp.zeros_like, state))
        return choose_rows(begins, first, state)

    def keep(share, x):
        return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), share * x if share else 0, x)

    def start(part):
        started = jax.tree.map(lambda x: keep(0, x), part)
        if isinstance(part, rwkv6.TimeMixState):
            return started._replace(wkv=keep(config.rwkv_carry, part.wkv))
        return started

    return jax.tree.map(start, state, is_leaf=lambda x: isinstance(x, rwkv6.TimeMixState))


def choose_rows(chosen: jax.Array, state: Any, other: Any) -> Any:
    """The rows of `state` where chosen [B] is true, those of `other` elsewhere."""
    return jax.tree.map(
        lambda x, y: jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, y).astype(y.dtype),
        state,
        other,
    )


def topic_shifts(
    n: jax.Array,
    state: TopicState | None,
    segment_ids: jax.Array | None,
    threshold: float,
    impl: str = "auto",
) -> tuple[jax.Array, TopicState]:
    """Where the topic shifts: [B, T] bool, from a block's input n [B, T, D], and the TopicState.

    impl is model.impl, for the scan.
    """
    B, T, D = n.shape
    n = jax.lax.stop_gradient(n).astype(jnp.float32)
    if state is None:
        state = TopicState(jnp.zeros((B, 2 * D)), jnp.zeros(B))
    x = jnp.concatenate([n / tokens for tokens in _TOKENS], axis=-1)
    decay = jnp.repeat(1 - 1 / jnp.array(_TOKENS, jnp.float32), D)
    means = linear_scan(jnp.broadcast_to(decay, x.shape), x, state.means, segment_ids, impl=impl)
    fast, slow = means[..., :D], means[..., D:]
    size = jnp.linalg.norm(fast, axis=-1) * jnp.linalg.norm(slow, axis=-1)
    cosine = jnp.where(size > 0, jnp.sum(fast * slow, axis=-1) / jnp.maximum(size, 1e-30), 1)
    above = 1 - cosine > threshold  # [B, T]
    before = jnp.concatenate([state.above[:, None] > 0, above[:, :-1]], axis=1)
    before &= ~resets(segment_ids, (B, T))
    return above & ~before, TopicState(means[:, -1], above[:, -1].astype(jnp.float32))


def reset_at(begins: jax.Array, state: Any, segment_ids: jax.Array | None) -> tuple[Any, jax.Array]:
    """A mixer's state and segment_ids [B, T] with resets added where `begins` [B, T] is true."""
    state = jax.tree.map(
        lambda x: jnp.where(begins[:, 0].reshape(-1, *[1] * (x.ndim - 1)), 0, x), state
    )
    return state, segment_index(segment_ids, (begins.shape[0], begins.shape[1])) + jnp.cumsum(
        begins, axis=1
    )
