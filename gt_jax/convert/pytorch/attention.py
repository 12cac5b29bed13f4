"""The attention baselines, with learned positions and a key-value cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.language_model import LanguageModel
from gt_jax.convert.pytorch.layers import FeedForward, RMSNorm, zeros


class Attention(nn.Module):
    """Causal multi-head attention over the document so far."""

    def __init__(self, config: Any):
        super().__init__()
        self.heads, self.max_positions = config.heads, config.max_positions
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, D], state (keys and values [B, max_positions, H, K], lengths [B]) -> y, state.

        Each row of a batch has a length of its own: that many places of its cache are filled.
        """
        B, T, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, K]
        if state is None:
            empty = k.new_zeros(B, self.max_positions, *k.shape[2:])
            state = empty, empty, torch.zeros(B, dtype=torch.long, device=x.device)
        keys, values, length = state
        place = length[:, None] + torch.arange(T, device=x.device)  # [B, T]
        row = torch.arange(B, device=x.device)[:, None]
        keys, values = keys.index_put((row, place), k), values.index_put((row, place), v)
        filled = int(place.max()) + 1
        seen = torch.arange(filled, device=x.device) <= place[..., None]  # [B, T, filled]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, :filled].transpose(1, 2),
            values[:, :filled].transpose(1, 2),
            attn_mask=seen[:, None],
        )
        return self.output(y.transpose(1, 2).flatten(2)), (keys, values, length + T)


class AttentionBlock(nn.Module):
    """x += Attention(norm x); x += FeedForward(norm x)."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        if config.feed_forward:
            self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.ffn = FeedForward(config.dim)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, D] float32, state of the attention -> x, state."""
        mixed, state = self.attention(self.mixer_norm(x), state)
        x = x + mixed
        if hasattr(self, "ffn"):
            x = x + self.ffn(self.ffn_norm(x))
        return x, state


class PositionalLanguageModel(LanguageModel):
    """A language model that adds a learned vector for each position to the embedding."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.positions = zeros(config.max_positions, config.dim)

    def embed(self, tokens: Tensor, state: list | None) -> Tensor:
        """tokens [B, T] -> [B, T, D] float32. Raises ValueError beyond the last position."""
        length = torch.zeros_like(tokens[:, 0]) if state is None else state[0][2]
        place = length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if (needed := int(place.max()) + 1) > len(self.positions):
            raise ValueError(f"the text has {needed} tokens; the model {len(self.positions)}")
        return super().embed(tokens, state) + self.positions[place]
