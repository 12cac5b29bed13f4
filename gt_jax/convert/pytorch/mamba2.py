"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.layers import FeedForward, RMSNorm, zeros


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2, a chunk of tokens at a time; a single token is a chunk of one.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;   y_t = S_t C_t

    Args:
        x: [B, T, H, P] float32.
        dt: [B, T, H], positive.
        A: [H], negative.
        B, C: [B, T, G, N]; each of G groups serves H / G heads.
        state: [B, H, P, N] before the first token, zeros if None.

    Returns:
        y [B, T, H, P] and the state after the last token.
    """
    batch, _, heads, P = x.shape
    B, C = (z.repeat_interleave(heads // z.shape[2], dim=2) for z in (B, C))  # [B, T, H, N]
    if state is None:
        state = x.new_zeros(batch, heads, P, B.shape[-1])
    chunks, outputs = zip(*(z.split(chunk, dim=1) for z in (x, dt, B, C))), []
    for x, dt, B, C in chunks:
        decay = (dt * A).cumsum(dim=1)  # logarithm, from the chunk's start through t  [B, C, H]
        # Token t sees s <= t through the decays of s + 1 ... t.
        seen = torch.ones(x.shape[1], x.shape[1], device=x.device).tril().bool()
        log_between = decay[:, :, None] - decay[:, None]  # [B, C(t), C(s), H]
        between = log_between.masked_fill(~seen[..., None], -torch.inf).exp()
        scores = torch.einsum("bthn,bshn->btsh", C, B) * between * dt[:, None]
        within = torch.einsum("btsh,bshp->bthp", scores, x)
        from_state = torch.einsum("bthn,bhpn->bthp", C * decay.exp()[..., None], state)
        outputs.append(within + from_state)
        end = decay[:, -1:]
        kept = torch.einsum("bsh,bshp,bshn->bhpn", (end - decay).exp() * dt, x, B)
        state = end[:, 0].exp()[..., None, None] * state + kept
    return torch.cat(outputs, dim=1), state


class CausalConv(nn.Module):
    """SiLU of a convolution over time, channel by channel: a token and those just before it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = zeros(channels, width)
        self.bias = zeros(channels)

    def forward(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels], the inputs before it or None for zeros -> y, the last inputs."""
        batch, T, channels = x.shape
        if tail is None:
            tail = x.new_zeros(batch, self.weight.shape[1] - 1, channels)
        window = torch.cat([tail, x], dim=1)
        y = F.conv1d(window.mT, self.weight[:, None], self.bias, groups=channels)
        return F.silu(y.mT), window[:, T:]


class GatedNorm(nn.Module):
    """RMSNorm of y silu(z), over each of the groups of channels by itself."""

    def __init__(self, dim: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z [B, T, E] -> [B, T, E] in the dtype of the weights."""
        x = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x.flatten(-2) * self.weight).to(self.weight.dtype)


class Mamba2(nn.Module):
    """The Mamba-2 mixer of inner width E = 2 D: H heads of P channels, state N, G groups."""

    def __init__(self, config: Any):
        super().__init__()
        E, N, G = 2 * config.dim, config.state_size, config.mamba_groups
        H = E // config.mamba_head_dim
        self.sizes = E, N, G, H
        self.in_proj = nn.Linear(config.dim, 2 * E + 2 * G * N + H, bias=False)
        self.conv1d = CausalConv(E + 2 * G * N, width=4)
        self.A_log, self.D, self.dt_bias = zeros(H), zeros(H), zeros(H)
        if config.learned_states:
            self.init_states = zeros(H, config.mamba_head_dim, N)
        self.norm = GatedNorm(E, G)
        self.out_proj = nn.Linear(E, config.dim, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, D], state (conv inputs, ssm [B, H, P, N]) -> y [B, T, D], state."""
        E, N, G, H = self.sizes
        tail, ssm = (None, None) if state is None else state
        if ssm is None and hasattr(self, "init_states"):
            ssm = self.init_states.float().expand(len(x), -1, -1, -1)
        z, xBC, dt = self.in_proj(x).split([E, E + 2 * G * N, H], dim=-1)
        xBC, tail = self.conv1d(xBC, tail)
        values, B, C = xBC.float().split([E, G * N, G * N], dim=-1)
        values = values.unflatten(-1, (H, -1))  # [B, T, H, P]
        B, C = B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        y, ssm = ssd(values, dt, -torch.exp(self.A_log.float()), B, C, ssm)
        y = y + self.D[:, None] * values
        return self.out_proj(self.norm(y.flatten(2), z)), (tail, ssm)


class Mamba2Block(nn.Module):
    """x += Mamba2(RMSNorm x), and x += FeedForward(RMSNorm x) where there is one."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mamba = Mamba2(config)
        if config.mamba_feed_forward:
            self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.ffn = FeedForward(config.dim)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, D] float32, state of the mixer -> x, state."""
        mixed, state = self.mamba(self.mixer_norm(x), state)
        x = x + mixed
        if hasattr(self, "ffn"):
            x = x + self.ffn(self.ffn_norm(x))
        return x, state
