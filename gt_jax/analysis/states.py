"""A model's memory: the part of its recurrent state that sums over the past."""

from typing import Any

import jax
import jax.numpy as jnp

from gt_jax.models import gpt2, hybrid, legacy, mamba2, rwkv6


def memories(block_state: Any) -> dict:
    """The memories in a block's state by part, "rwkv", "mamba" or "fusion": arrays [B, ...].

    If both branches are of one kind, the second one's memory is "rwkv_2" or "mamba_2".

    Not included: the last inputs that token shift and convolution keep, and the key-value cache of
    attention, which is no sum.
    """
    match block_state:
        case hybrid.BlockState() | hybrid.TopicBlockState():
            rwkv, mamba, fusion = block_state[:3]
            found = memories(rwkv)
            found |= {f"{k}_2" if k in found else k: v for k, v in memories(mamba).items()}
            return found if fusion is None else found | {"fusion": fusion}
        case rwkv6.BlockState(rwkv=rwkv):
            return memories(rwkv)
        case rwkv6.TimeMixState(wkv=memory) | legacy.VectorState(numerator=memory):
            return {"rwkv": memory}
        case mamba2.MambaState(ssm=memory):
            return {"mamba": memory}
        case gpt2.Cache():
            return {}
    return {"rwkv": block_state}  # the legacy branch's matrix


def norm(memory: jax.Array) -> jax.Array:
    """Frobenius norm of each row's memory, [B, ...] -> [B] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(memory), axis=tuple(range(1, memory.ndim))))
