"""The fusions of `gt_jax.models.fusion`, each under the name of its Flax module.

A fusion is a module of (rwkv, mamba, state) -> (fused, state) with rwkv, mamba and fused [B, T, D];
most keep no state. One whose Flax module says reads_input gets the block's input [B, T, D] last.

It computes in float32 and may use what stands in the other files here. To give a new one its
PyTorch form, write a class of the same name with parameters of the same names; no other place names
it, and tests/convert/test_pytorch.py then compares the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.layers import RMSNorm, linear_scan, zeros


class Gains(nn.Module):
    """HY: gain_r RMSNorm(rwkv) + gain_m RMSNorm(mamba), one gain per channel."""

    def __init__(self, config: Any):
        super().__init__()
        self.rwkv_gain, self.mamba_gain = zeros(config.dim), zeros(config.dim)
        self.rwkv_norm = RMSNorm(config.dim, eps=config.fusion_eps)
        self.mamba_norm = RMSNorm(config.dim, eps=config.fusion_eps)

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


class MinGRU(nn.Module):
    """MinGRU: a minGRU over both normalised branches weighs them by softmax(W s_t + b).

    s_t = (1 - u_t) s_{t-1} + u_t g(c_t) with u = sigmoid(U n), c = C n, and neither reads s_{t-1}.
    """

    def __init__(self, config: Any):
        super().__init__()
        D, hidden = config.dim, 3 * config.dim // 2
        self.rwkv_norm = RMSNorm(D, eps=config.fusion_eps)
        self.mamba_norm = RMSNorm(D, eps=config.fusion_eps)
        self.candidate_kernel, self.update_kernel = zeros(2 * D, hidden), zeros(2 * D, hidden)
        self.head_kernel, self.head_bias = zeros(hidden, 2), zeros(2)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """rwkv, mamba [B, T, D], s [B, 1.5 D] before -> fused [B, T, D], s after."""
        pair = torch.cat([self.rwkv_norm(rwkv), self.mamba_norm(mamba)], dim=-1)
        candidate = (pair @ self.candidate_kernel).float()
        update = (pair @ self.update_kernel).float()
        value = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        s = linear_scan(torch.sigmoid(-update), torch.sigmoid(update) * value, state)
        weights = F.softmax(s @ self.head_kernel.float() + self.head_bias, dim=-1)
        return weights[..., :1] * rwkv + weights[..., 1:] * mamba, s[:, -1]


class RunningMean(nn.Module):
    """LINREC: softmax(W c_t + b) of a weighted mean of all tokens so far weighs the branches.

    c_t = sum of q_s x_s / sum of q_s over s <= t, with x = [rwkv; mamba] and q = sigmoid(w . x + v)
    """

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.kernel, self.bias = zeros(2 * D, 1), zeros(1)
        self.head_kernel, self.head_bias = zeros(2 * D, 2), zeros(2)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """rwkv, mamba [B, T, D], sums [B, 3] before -> fused [B, T, D], sums after."""
        pair = torch.cat([rwkv, mamba], dim=-1).float()
        score = pair @ self.kernel.float() + self.bias
        q = torch.sigmoid(score.clamp(min=-30))  # [B, T, 1]
        terms = torch.cat([q * (pair @ self.head_kernel.float()), q], dim=-1)
        sums = linear_scan(torch.ones_like(terms), terms, state)
        weights = F.softmax(sums[..., :2] / sums[..., 2:] + self.head_bias, dim=-1)
        return weights[..., :1] * rwkv + weights[..., 1:] * mamba, sums[:, -1]


class GLU(nn.Module):
    """GLU: W_o (w_0 rwkv + w_1 mamba) with w = softmax(W c + b).

    c = sigmoid(W_r n) r + sigmoid(W_m n) m of the normalised branches r, m and the block's input n.
    """

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.rwkv_norm = RMSNorm(D, eps=config.fusion_eps)
        self.mamba_norm = RMSNorm(D, eps=config.fusion_eps)
        self.rwkv_kernel, self.mamba_kernel = zeros(D, D), zeros(D, D)
        self.head_kernel, self.head_bias = zeros(D, 2), zeros(2)
        self.output_kernel = zeros(D, D)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None, n: Tensor) -> tuple[Tensor, None]:
        """rwkv, mamba and the block's input [B, T, D] -> fused [B, T, D], no state."""
        r, m = self.rwkv_norm(rwkv), self.mamba_norm(mamba)
        c = torch.sigmoid((n @ self.rwkv_kernel).float()) * r
        c = c + torch.sigmoid((n @ self.mamba_kernel).float()) * m
        weights = F.softmax(c @ self.head_kernel.float() + self.head_bias, dim=-1)
        fused = weights[..., :1] * rwkv + weights[..., 1:] * mamba
        return fused.to(n.dtype) @ self.output_kernel, state


class ParallelFusion(nn.Module):
    """PARALLEL: W_o (sigmoid(G_r n + b_r) r + sigmoid(G_m n + b_m) m), n the block's input."""

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.rwkv_norm = RMSNorm(D, eps=config.fusion_eps)
        self.mamba_norm = RMSNorm(D, eps=config.fusion_eps)
        self.rwkv_kernel, self.rwkv_bias = zeros(D, D), zeros(D)
        self.mamba_kernel, self.mamba_bias = zeros(D, D), zeros(D)
        self.output_kernel = zeros(D, D)

    def forward(self, rwkv: Tensor, mamba: Tensor, state: None, n: Tensor) -> tuple[Tensor, None]:
        """rwkv, mamba and the block's input [B, T, D] -> fused [B, T, D], no state."""
        r, m = self.rwkv_norm(rwkv), self.mamba_norm(mamba)
        r = torch.sigmoid((n @ self.rwkv_kernel).float() + self.rwkv_bias) * r
        m = torch.sigmoid((n @ self.mamba_kernel).float() + self.mamba_bias) * m
        return (r + m).to(n.dtype) @ self.output_kernel, state


class ParallelScan(nn.Module):
    """PSCAN: W_o h_t with h_t = a_t h_{t-1} + (1 - a_t) i_t c_t, a memory of the weighted branches.

    a = sigmoid(A n + b_a), i = sigmoid(I n), c = w_0 r + w_1 m, w = softmax(W n + b), of the
    normalised branches r, m and the block's input n.
    """

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.rwkv_norm = RMSNorm(D, eps=config.fusion_eps)
        self.mamba_norm = RMSNorm(D, eps=config.fusion_eps)
        self.decay_kernel, self.decay_bias = zeros(D, D), zeros(D)
        self.input_kernel, self.output_kernel = zeros(D, D), zeros(D, D)
        self.head_kernel, self.head_bias = zeros(D, 2), zeros(2)

    def forward(
        self, rwkv: Tensor, mamba: Tensor, state: Tensor | None, n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """rwkv, mamba and the block's input [B, T, D], h [B, D] before -> fused, h after."""
        r, m = self.rwkv_norm(rwkv).float(), self.mamba_norm(mamba).float()
        weights = F.softmax(n.float() @ self.head_kernel.float() + self.head_bias, dim=-1)
        keep = (n @ self.decay_kernel).float() + self.decay_bias
        scale = torch.sigmoid(-keep) * torch.sigmoid((n @ self.input_kernel).float())
        c = weights[..., :1] * r + weights[..., 1:] * m
        h = linear_scan(torch.sigmoid(keep), scale * c, state)
        return h.to(n.dtype) @ self.output_kernel, h[:, -1]
