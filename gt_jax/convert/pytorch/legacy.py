"""The RWKV branch of the GroundThink reference repository, in its four variants."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.layers import FeedForward, LayerNorm, RMSNorm, zeros
from gt_jax.convert.pytorch.rwkv6 import wkv6


def decayed_sums(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: tuple | None, variant: str
) -> tuple[Tensor, tuple]:
    """The recurrence of variants b1, b2 and c, over one number a channel.

    s_t = w s_{t-1} + exp(k_t) v_t, and z_t the same of ones; read as s_t (b1) or s_t / z_t.

    Args:
        k, v: [B, T, D] float32.
        log_w, u: [D].
        state: s and z [B, D] before the first token, None where a document begins.

    Returns:
        y [B, T, D] and the state after the last token.
    """
    limits = {"b1": (None, None), "b2": (None, 30), "c": (-10, 10)}[variant]
    weight = k.exp() if variant == "b1" else k.clamp(*limits).exp()
    first, outputs = state is None, []
    s, z = (torch.zeros_like(k[:, 0]),) * 2 if state is None else state
    for e, value in zip(weight.unbind(dim=1), v.unbind(dim=1)):
        s = log_w.exp() * s + e * value
        z = log_w.exp() * z + e
        bonus = u.exp() if first else 1
        if variant == "b1":
            outputs.append(s + bonus * value if first else s)
        else:
            outputs.append(bonus * s / (bonus * z + 1e-6))
        first = False
    return torch.stack(outputs, dim=1), (s, z)


class LegacyBranch(nn.Module):
    """n' = n + W_o (sigmoid(r) wkv(k, v)); out = n' + F_v relu(F_k LN n')^2, reading y = LN n.

    Variant c is W_o (sigmoid(r) wkv(k, v)) of n itself.
    """

    def __init__(self, config: Any):
        super().__init__()
        D, heads = config.dim, config.heads
        self.variant = config.legacy_wkv
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.time_decay, self.time_first = zeros(heads, D // heads), zeros(heads, D // heads)
        if self.variant != "c":
            self.mixer_norm = LayerNorm(D, eps=1e-5)
            self.ffn_norm = LayerNorm(D, eps=1e-5)
            self.ffn_key = nn.Linear(D, 4 * D, bias=False)
            self.ffn_value = nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x [B, T, D], state of the recurrence -> y [B, T, D], state."""
        y = x if self.variant == "c" else self.mixer_norm(x)
        r, k, v = self.receptance(y).float(), self.key(y).float(), self.value(y).float()
        log_w, u = -self.time_decay.float().exp(), self.time_first.float()
        if self.variant == "a":
            r_, k_, v_ = (z.unflatten(-1, u.shape) for z in (r, k, v))  # [B, T, H, K]
            y, state = wkv6(r_, k_, v_, log_w.expand(r_.shape), u, state)
            y = y.flatten(2)
        else:
            y, state = decayed_sums(k, v, log_w.flatten(), u.flatten(), state, self.variant)
        y = self.output((torch.sigmoid(r) * y).to(x.dtype))
        if self.variant == "c":
            return y, state
        x = x + y
        return x + self.ffn_value(F.relu(self.ffn_key(self.ffn_norm(x))).square()), state


class LegacyBlock(nn.Module):
    """x += LegacyBranch(RMSNorm x); x += FeedForward(RMSNorm x)."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.rwkv = LegacyBranch(config)
        if config.feed_forward:
            self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.ffn = FeedForward(config.dim)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, D] float32, state of the branch -> x, state."""
        mixed, state = self.rwkv(self.mixer_norm(x), state)
        x = x + mixed
        if hasattr(self, "ffn"):
            x = x + self.ffn(self.ffn_norm(x))
        return x, state
