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

from gt_jax.kernels.elementwise import residual_norm
from gt_jax.models import blocks, stream
from gt_jax.models.carry import TopicState, reset_at, topic_shifts
from gt_jax.models.config import ModelConfig
from gt_jax.models.fusion import FUSIONS, Gate
from gt_jax.models.gates import post_norm
from gt_jax.models.layers import FeedForward, record, rms_norm
from gt_jax.models.legacy import LegacyBranch
from gt_jax.models.mamba2 import Mamba2
from gt_jax.models.rwkv6 import TimeMix


class BlockState(NamedTuple):
    """States of a block's branches and of its fusion (None if it keeps none)."""

    rwkv: Any
    mamba: Any
    fusion: Any


class TopicBlockState(NamedTuple):
    """A BlockState, and the topic whose shifts reset Mamba's (model.mamba_reset)."""

    rwkv: Any
    mamba: Any
    fusion: Any
    topic: TopicState


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
        x: jax.Array | stream.Sum,
        state: BlockState | TopicBlockState | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array | stream.Sum, BlockState | TopicBlockState]:
        c = self.config
        record(self, block_stream=stream.summed(x))
        leaves_sum = isinstance(x, stream.Sum)
        state = BlockState(None, None, None) if state is None else state
        rwkv_mixer, mamba_mixer = (self._mixer(name) for name in c.branch_names)
        fusion = FUSIONS[c.fusion](c, name="fusion")
        reads_input = getattr(fusion, "reads_input", False)
        # Equal, for either branch and for a fusion that reads the block's input.
        x, (n, other, *third) = stream.normed(c, "mixer_norm", x, readers=2 + reads_input)
        shifts, topic = None, None
        if c.mamba_reset is not None:
            topic = getattr(state, "topic", None)
            shifts, topic = topic_shifts(n, topic, segment_ids, c.mamba_reset, c.impl)

        def mix(mixer, n, before):
            ids = segment_ids
            if shifts is not None and isinstance(mixer, Mamba2):
                before, ids = reset_at(shifts, before, ids)
            return mixer(n, before, segment_ids=ids)

        rwkv, rwkv_state = mix(rwkv_mixer, n, state.rwkv)
        mamba, mamba_state = mix(mamba_mixer, other, state.mamba)
        if rwkv_drop is not None:
            rwkv = drop_branch(rwkv, rwkv_drop, self.make_rng("dropout"))
        record(self, rwkv_out=rwkv, mamba_out=mamba, block_input=n)
        fusion_state, branches = state.fusion, with_residuals(c, rwkv, mamba, n)
        joins = _joins_in_kernel(c, x, *branches)
        if joins and type(fusion) is Gate:
            norm = rms_norm(c, "ffn_norm")
            kernel, bias = fusion.parameters()
            given = norm.epsilon, x, *branches, kernel, bias, norm.weight(c.dim)
            joined: Any = residual_norm.gated(*given)  # custom_vjp hides the type
            x, n, gate = joined
            record(fusion, gate=gate)
            if self.is_mutable_collection("activations"):  # computed if anybody uses it
                record(self, fused=fusion.join(gate, *branches))
        elif joins and hasattr(fusion, "score"):
            norm = rms_norm(c, "ffn_norm")
            given = fusion.score(*branches, fusion_state, segment_ids)
            branches, score, bias, fusion_state = given
            given = norm.epsilon, x, *branches, score, bias, norm.weight(c.dim)
            joined = residual_norm.blended(*given)
            x, n, gate = joined
            record(fusion, gate=gate)
            if self.is_mutable_collection("activations"):  # computed if anybody uses it
                record(self, fused=Gate.join(gate, *branches))
        else:
            given = {"block_input": third[0]} if reads_input else {}
            fused, fusion_state = fusion(*branches, state.fusion, segment_ids, **given)
            record(self, fused=fused)
            update = post_norm(c, "fused_norm")(fused) if c.post_norm else fused
            if c.feed_forward:
                x, n = stream.add_and_norm(c, "ffn_norm", x, update)
            else:
                x = x + update
        if c.feed_forward:
            x = stream.add_later(c, x, FeedForward(c, name="ffn")(n))
            x = x if leaves_sum else stream.summed(x)
        record(self, block_out=stream.summed(x))
        states = rwkv_state, mamba_state, fusion_state
        return x, BlockState(*states) if topic is None else TopicBlockState(*states, topic)

    def _mixer(self, name):
        if name.startswith("mamba"):
            return Mamba2(self.config, name=name)
        if self.config.branch == "legacy":
            return LegacyBranch(self.config, name=name)
        return TimeMix(self.config, self.layer, name=name)


def _joins_in_kernel(config, x, rwkv, mamba) -> bool:
    """Whether one kernel joins gated branches, adds them to the stream and normalises it.

    Not where calls of the fusion are intercepted: there would be none.
    """
    return (
        config.feed_forward
        and not blocks.intercepted()
        and not config.post_norm
        and rwkv.dtype == mamba.dtype == jnp.bfloat16
        and stream.takes_kernels(config, x, is_gated=True)
    )


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
