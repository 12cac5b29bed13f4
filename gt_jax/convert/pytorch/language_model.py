"""The model around the blocks."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gt_jax.convert.pytorch.hybrid import HybridBlock
from gt_jax.convert.pytorch.layers import RMSNorm


class LanguageModel(nn.Module):
    """Tokens in, logits and state out; the same call trains, prefills and steps."""

    def __init__(self, config: Any):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HybridBlock(config, layer) for layer in range(config.layers))
        self.final_norm = RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        """Applies the model.

        Args:
            tokens: [B, T] int64.
            state: what an earlier call returned for the tokens before these; None at the start.

        Returns:
            logits [B, T, vocab_size] float32, and the state after the last token: one entry a
            block, nested tuples of tensors whose first axis is B.
        """
        x, after = self.embed(tokens, state), []
        for i, block in enumerate(self.blocks):
            x, block_state = block(x, None if state is None else state[i])
            after.append(block_state)
        head = self.head if hasattr(self, "head") else self.embedding
        return F.linear(self.final_norm(x), head.weight).float(), after

    def embed(self, tokens: Tensor, state: list | None) -> Tensor:
        """tokens [B, T] -> [B, T, D] float32, as which the residual stream stays."""
        return self.embedding(tokens).float()


def load(folder: str | Path = ".") -> nn.Module:
    """The model of a folder of config.json and safetensors, without transformers."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    model = LanguageModel(SimpleNamespace(**config))
    weights = {}
    for file in Path(folder).glob("model*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()})
    return model.eval()


def map_tensors(function: Callable, *states: Any) -> Any:
    """function(tensors at the same place of every state), in a state of the same nesting."""
    if states[0] is None:
        return None
    if isinstance(states[0], Tensor):
        return function(*states)
    return type(states[0])(map_tensors(function, *parts) for parts in zip(*states))
