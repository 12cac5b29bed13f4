"""RWKV-6 "Finch" (Peng et al. 2024, arXiv:2404.05892)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.layers import LayerNorm, previous_token, zeros


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: Tensor | None,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-6, a chunk of tokens at a time; a single token is a chunk of one.

    S_t = diag(w_t) S_{t-1} + k_t v_t^T;   y_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t

    Args:
        r, k, v, log_w: [B, T, H, K] float32; log_w <= 0 is the logarithm of w.
        u: [H, K], the bonus of the present token.
        state: [B, H, K, V] before the first token, zeros if None.

    Returns:
        y [B, T, H, V] and the state after the last token.
    """
    B, _, H, K = r.shape
    if state is None:
        state = r.new_zeros(B, H, K, v.shape[-1])
    chunks, outputs = zip(*(x.split(chunk, dim=1) for x in (r, k, v, log_w))), []
    for r, k, v, log_w in chunks:
        through = log_w.cumsum(dim=1)  # log of w_1 ... w_t  [B, C, H, K]
        before = through - log_w  # log of w_1 ... w_{t-1}
        # Token t sees s < t through w_{s+1} ... w_{t-1}, and itself through u.
        earlier = torch.ones(r.shape[1], r.shape[1], device=r.device).tril(-1).bool()
        log_between = before[:, :, None] - through[:, None]  # [B, C(t), C(s), H, K]
        between = log_between.masked_fill(~earlier[..., None, None], -torch.inf).exp()
        scores = torch.einsum("bthk,btshk,bshk->bhts", r, between, k)
        scores = scores + torch.einsum("bthk,hk,bthk->bht", r, u, k).diag_embed()
        within = torch.einsum("bhts,bshv->bthv", scores, v)
        from_state = torch.einsum("bthk,bhkv->bthv", r * before.exp(), state)
        outputs.append(within + from_state)
        end = through[:, -1:]
        kept = torch.einsum("bshk,bshv->bhkv", k * (end - through).exp(), v)
        state = end[:, 0].exp()[..., None] * state + kept
    return torch.cat(outputs, dim=1), state


class TimeMix(nn.Module):
    """The RWKV-6 mixer: every projection reads its own blend of a token and the one before."""

    def __init__(self, config: Any):
        super().__init__()
        D = config.dim
        self.heads = config.heads
        self.time_maa_x, self.time_maa_w, self.time_maa_k = zeros(D), zeros(D), zeros(D)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = zeros(D), zeros(D), zeros(D)
        self.time_maa_w1 = zeros(D, 5 * config.mix_rank)
        self.time_maa_w2 = zeros(5, config.mix_rank, D)
        self.time_decay = zeros(D)
        self.time_decay_w1 = zeros(D, config.decay_rank)
        self.time_decay_w2 = zeros(config.decay_rank, D)
        self.time_faaaa = zeros(self.heads, D // self.heads)
        if config.learned_states:
            self.time_state = zeros(self.heads, D // self.heads, D // self.heads)
        self.receptance = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.gate = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.ln_x = nn.GroupNorm(self.heads, D, eps=64e-5)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, D], state (last input [B, D], wkv [B, H, K, K]) -> y [B, T, D], state."""
        last, wkv = (None, None) if state is None else state
        if wkv is None and hasattr(self, "time_state"):
            wkv = self.time_state.float().expand(len(x), -1, -1, -1)
        delta = previous_token(x, last) - x

        hidden = torch.tanh((x + delta * self.time_maa_x) @ self.time_maa_w1)  # [B, T, 5 R]
        shares = torch.einsum("btjr,jrd->jbtd", hidden.unflatten(-1, (5, -1)), self.time_maa_w2)
        x_w = x + delta * (self.time_maa_w + shares[0])
        x_k = x + delta * (self.time_maa_k + shares[1])
        x_v = x + delta * (self.time_maa_v + shares[2])
        x_r = x + delta * (self.time_maa_r + shares[3])
        x_g = x + delta * (self.time_maa_g + shares[4])

        r, k, v, g = self.receptance(x_r), self.key(x_k), self.value(x_v), self.gate(x_g)
        change = torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        log_w = -torch.exp(self.time_decay.float() + change.float())
        r, k, v, log_w = (z.float().unflatten(-1, (self.heads, -1)) for z in (r, k, v, log_w))
        y, wkv = wkv6(r, k, v, log_w, self.time_faaaa.float(), wkv)

        y = y.flatten(2).to(x.dtype)  # [B, T, D]
        y = self.ln_x(y.flatten(0, 1)).view_as(y) * F.silu(g)
        return self.output(y), (x[:, -1], wkv)


class ChannelMix(nn.Module):
    """The RWKV-6 feed-forward: sigmoid(W_r x_r) * W_v relu(W_k x_k)^2."""

    def __init__(self, config: Any):
        super().__init__()
        D, hidden = config.dim, config.ffn_dim
        self.time_maa_k, self.time_maa_r = zeros(D), zeros(D)
        self.key = nn.Linear(D, hidden, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], last input [B, D] -> y [B, T, D], last input."""
        delta = previous_token(x, last) - x
        x_k = x + delta * self.time_maa_k
        x_r = x + delta * self.time_maa_r
        y = self.value(F.relu(self.key(x_k)).square())
        return torch.sigmoid(self.receptance(x_r)) * y, x[:, -1]


class RWKV6Block(nn.Module):
    """x += TimeMix(LN x); x += ChannelMix(LN x). The first block first normalises the embedding."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        if layer == 0:
            self.embedding_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.mixer_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.rwkv = TimeMix(config)
        if config.feed_forward:
            self.ffn_norm = LayerNorm(config.dim, eps=config.norm_eps)
            self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """x [B, T, D] float32, state of both mixers -> x, state."""
        mixer_state, last = (None, None) if state is None else state
        if hasattr(self, "embedding_norm"):
            x = self.embedding_norm(x).float()
        mixed, mixer_state = self.rwkv(self.mixer_norm(x), mixer_state)
        x = x + mixed
        if hasattr(self, "ffn"):
            mixed, last = self.ffn(self.ffn_norm(x), last)
            x = x + mixed
        return x, (mixer_state, last)
