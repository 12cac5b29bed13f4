"""What several models share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zeros(*shape: int) -> nn.Parameter:
    """A parameter, to be loaded."""
    return nn.Parameter(torch.zeros(shape))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in the dtype of the weights."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, for a residual stream that is float32 whatever the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in the dtype of the weights."""
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Module):
    """W_down gelu(W_up x), four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.down(F.gelu(self.up(x)))


def linear_scan(decay: Tensor, x: Tensor, state: Tensor | None) -> Tensor:
    """s_t = decay_t s_{t-1} + x_t; decay and x [B, T, C], s before [B, C] or None for zeros."""
    s = torch.zeros_like(x[:, 0]) if state is None else state
    seen = []
    for decay_t, x_t in zip(decay.unbind(dim=1), x.unbind(dim=1)):
        s = decay_t * s + x_t
        seen.append(s)
    return torch.stack(seen, dim=1)


def previous_token(x: Tensor, last: Tensor | None) -> Tensor:
    """x [B, T, D] one token earlier; `last` [B, D] stands before the first, zeros if None."""
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None]
    return torch.cat([first, x[:, :-1]], dim=1)
