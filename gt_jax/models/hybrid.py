"""The hybrid block: RWKV-6 and Mamba-2 read the same normalised input, a fusion joins them.

n = RMSNorm(x);  x += fuse(rwkv(n), mamba(n));  x += FeedForward(RMSNorm(x))

With model.residual a branch adds its input to its output, n + mamba(n), before they are fused: then
it contributes even if it says nothing. With model.post_norm the update is normalised. The
twin-debate block has both and no feed-forward: x += RMSNorm(fuse(rwkv(n), n + mamba(n))).

As a control, both branches may be of one kind: the first then stands in rwkv's place, the second in
mamba's, in all but the names of their parameters.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gt_jax.models.carry import TopicState, reset_at, topic_shifts
from gt_jax.models.config import ModelConfig
from gt_jax.models.fusion import FUSIONS
from gt_jax.models.gates import post_norm
from gt_jax.models.layers import FeedForward, record, rms_norm
from gt_jax.models.legacy import LegacyBranch
from gt_jax.models.mamba2 import Mamba2
from gt_jax.models.rwkv6 import TimeMix


class BlockState(NamedTuple):
    """States of a block's branches, of its fusion and of its topic (None if it keeps none)."""

    rwkv: Any
    mamba: Any
    fusion: Any
    topic: TopicState | None = None


class Block(nn.Module):
    """One hybrid block; records activations rwkv_out, mamba_out, block_input and fused [B, T, D].

    The first two are what the mixers say, without the input that model.residual adds; fused is
    before model.post_norm. block_stream and block_out are the residual stream before and after.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: BlockState | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array, BlockState]:
        c = self.config
        record(self, block_stream=x)
        state = BlockState(None, None, None) if state is None else state
        rwkv_mixer, mamba_mixer = (self._mixer(name) for name in c.branch_names)
        n = rms_norm(c, "mixer_norm")(x)
        shifts, topic = None, None
        if c.mamba_reset is not None:
            shifts, topic = topic_shifts(n, state.topic, segment_ids, c.mamba_reset)

        def mix(mixer, before):
            ids = segment_ids
            if shifts is not None and isinstance(mixer, Mamba2):
                before, ids = reset_at(shifts, before, ids)
            return mixer(n, before, segment_ids=ids)

        rwkv, rwkv_state = mix(rwkv_mixer, state.rwkv)
        mamba, mamba_state = mix(mamba_mixer, state.mamba)
        if rwkv_drop is not None:
            rwkv = drop_branch(rwkv, rwkv_drop, self.make_rng("dropout"))
        record(self, rwkv_out=rwkv, mamba_out=mamba, block_input=n)
        fusion = FUSIONS[c.fusion](c, name="fusion")
        fused, fusion_state = fusion(
            *with_residuals(c, rwkv, mamba, n),
            state.fusion,
            segment_ids,
            **({"block_input": n} if getattr(fusion, "reads_input", False) else {}),
        )
        record(self, fused=fused)
        x = x + (post_norm(c, "fused_norm")(fused) if c.post_norm else fused)
        if c.feed_forward:
            x = x + FeedForward(c, name="ffn")(rms_norm(c, "ffn_norm")(x))
        record(self, block_out=x)
        return x, BlockState(rwkv_state, mamba_state, fusion_state, topic)

    def _mixer(self, name):
        if name.startswith("mamba"):
            return Mamba2(self.config, name=name)
        if self.config.branch == "legacy":
            return LegacyBranch(self.config, name=name)
        return TimeMix(self.config, self.layer, name=name)


def with_residuals(
    config: ModelConfig, rwkv: jax.Array, mamba: jax.Array, block_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the fusion reads of both branches [B, T, D], by model.residual."""
    if config.residual == "both":
        rwkv = block_input + rwkv
    return rwkv, mamba if config.residual == "none" else block_input + mamba


def drop_branch(branch: jax.Array, probability: float | jax.Array, key: jax.Array) -> jax.Array:
    """Zeroes the whole branch with this probability, else divides it by the chance of staying."""
    keep = jax.random.bernoulli(key, 1 - probability)
    scale = jnp.where(keep, 1 / jnp.maximum(1 - probability, 1e-6), 0)
    return branch * scale.astype(branch.dtype)
