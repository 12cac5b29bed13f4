"""The fusions of `gt_jax.models.fusion`, each under the name of its Flax module.

A fusion is a module of (rwkv, mamba, state) -> (fused, state) with rwkv, mamba and fused [B, T, D];
most keep no state. It computes in float32 and may use what stands in the other files here. To give
a new one its PyTorch form, write a class of the same name with parameters of the same names; no
other place names it, and tests/convert/test_pytorch.py then compares the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.layers import RMSNorm, zeros


class Gains(nn.Module):
    """HY: gain_r RMSNorm(rwkv) + gain_m RMSNorm(mamba), one gain per channel."""

    def __init__(self, config: Any):
        super().__init__()
        self.rwkv_gain, self.mamba_gain = zeros(config.dim), zeros(config.dim)
        self.rwkv_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mamba_norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        rwkv, mamba = self.rwkv_norm(rwkv).float(), self.mamba_norm(mamba).float()
        return self.rwkv_gain * rwkv + self.mamba_gain * mamba, state


class Gate(nn.Module):
    """GF: g rwkv + (1 - g) mamba with one g = sigmoid(w . [rwkv; mamba] + b) per position."""

    def __init__(self, config: Any):
        super().__init__()
        self.kernel, self.bias = zeros(2 * config.dim), zeros(1)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        pair = torch.cat([rwkv, mamba], dim=-1).float()
        score = (pair * self.kernel).sum(-1, keepdim=True)
        gate = torch.sigmoid(score + self.bias)  # [B, T, 1]
        return gate * rwkv + (1 - gate) * mamba, state


class ChannelGate(nn.Module):
    """HGF: like GF, with one gate per position and channel."""

    def __init__(self, config: Any):
        super().__init__()
        self.kernel, self.bias = zeros(2 * config.dim, config.dim), zeros(config.dim)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        score = torch.cat([rwkv, mamba], dim=-1) @ self.kernel
        gate = torch.sigmoid(score.float() + self.bias)
        return gate * rwkv + (1 - gate) * mamba, state


class WeightedSum(nn.Module):
    """WS: alpha rwkv + (1 - alpha) mamba, one alpha per layer."""

    def __init__(self, config: Any):
        super().__init__()
        self.alpha = zeros(1)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        return self.alpha * rwkv + (1 - self.alpha) * mamba, state


class Residual(nn.Module):
    """RF: rwkv + W_p mamba."""

    def __init__(self, config: Any):
        super().__init__()
        self.kernel = zeros(config.dim, config.dim)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        return rwkv + mamba @ self.kernel, state


class Concat(nn.Module):
    """CP: W_c [rwkv; mamba]."""

    def __init__(self, config: Any):
        super().__init__()
        self.kernel = zeros(2 * config.dim, config.dim)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None) -> tuple[Tensor, None]:
        """rwkv, mamba [B, T, D] -> fused [B, T, D], no state."""
        return torch.cat([rwkv, mamba], dim=-1) @ self.kernel, state


class GRU(nn.Module):
    """GRU: h_t = GRU([rwkv; mamba], h_{t-1}) weighs both branches by softmax(W h_t + b)."""

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.input_kernel, self.input_bias = zeros(2 * D, 3 * D), zeros(3 * D)
        self.hidden_kernel, self.hidden_bias = zeros(D, 3 * D), zeros(3 * D)
        self.head_kernel, self.head_bias = zeros(D, 2), zeros(2)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """rwkv, mamba [B, T, D], h [B, D] before -> fused [B, T, D], h after the last token."""
        pair = torch.cat([rwkv, mamba], dim=-1)
        inputs = (pair @ self.input_kernel).float() + self.input_bias
        h = inputs.new_zeros(rwkv[:, 0].shape) if state is None else state
        seen = []
        for x in inputs.unbind(dim=1):  # [B, 3 D]
            y = (h.to(pair.dtype) @ self.hidden_kernel).float() + self.hidden_bias
            x_reset, x_update, x_new = x.chunk(3, dim=-1)
            y_reset, y_update, y_new = y.chunk(3, dim=-1)
            reset, update = torch.sigmoid(x_reset + y_reset), torch.sigmoid(x_update + y_update)
            h = (1 - update) * torch.tanh(x_new + reset * y_new) + update * h
            seen.append(h)
        scores = torch.stack(seen, dim=1) @ self.head_kernel.float() + self.head_bias
        weights = F.softmax(scores, dim=-1)
        return weights[..., :1] * rwkv + weights[..., 1:] * mamba, h
