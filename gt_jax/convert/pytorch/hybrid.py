"""The block of two branches."""

from typing import Any

from torch import Tensor, nn

from gt_jax.convert.pytorch.fusions import Gate
from gt_jax.convert.pytorch.layers import FeedForward, RMSNorm
from gt_jax.convert.pytorch.mamba2 import Mamba2
from gt_jax.convert.pytorch.rwkv6 import TimeMix


class HybridBlock(nn.Module):
    """Two mixers read the same input, a fusion joins them, a feed-forward follows.

    n = RMSNorm(x);   x += fuse(rwkv(n), mamba(n));   x += FeedForward(RMSNorm(x))

    config.residual adds n to what a branch says; config.post_norm norms what the fusion says.
    """

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.rwkv = TimeMix(config)
        self.mamba = Mamba2(config)
        self.fusion = Gate(config)
        self.residual = config.residual  # the second branch or both add the input, or none
        if config.post_norm:
            self.fused_norm = RMSNorm(config.dim, eps=config.post_norm_eps)
        if config.feed_forward:
            self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.ffn = FeedForward(config.dim)

    def forward(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """x [B, T, D] float32, states of the branches and of the fusion -> x, states."""
        rwkv_state, mamba_state, fusion_state = (None, None, None) if state is None else state
        n = self.mixer_norm(x)
        rwkv, rwkv_state = self.rwkv(n, rwkv_state)
        mamba, mamba_state = self.mamba(n, mamba_state)
        if self.residual == "both":
            rwkv = n + rwkv
        if self.residual != "none":
            mamba = n + mamba
        fused, fusion_state = self.fusion(rwkv, mamba, fusion_state)
        if hasattr(self, "fused_norm"):
            fused = self.fused_norm(fused)
        x = x + fused
        if hasattr(self, "ffn"):
            x = x + self.ffn(self.ffn_norm(x))
        return x, (rwkv_state, mamba_state, fusion_state)
