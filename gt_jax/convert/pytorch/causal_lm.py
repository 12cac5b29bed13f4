"""What transformers needs around the language model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from gt_jax.convert.pytorch.language_model import LanguageModel, map_tensors


class GtJaxConfig(PretrainedConfig):
    """config.json; gt_jax.models.ModelConfig says what its fields are."""

    model_type = "gt_jax"
    attribute_map = {"hidden_size": "dim", "num_hidden_layers": "layers"}  # noqa: RUF012


class GenerationState:
    """The state as generate() carries it: it can pick and repeat rows, for beam search."""

    def __init__(self, blocks: list):
        self.blocks = blocks

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.blocks = map_tensors(lambda x: x[rows.to(x.device)], self.blocks)


@dataclass
class GtJaxOutput(ModelOutput):
    """loss [] if there were labels, logits [B, T, vocab_size] float32, and the state after."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: GenerationState | None = None


class GtJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model with the interface of transformers."""

    config_class = GtJaxConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state cannot be taken back, so there is no assisted generation

    def __init__(self, config: GtJaxConfig):
        super().__init__(config)
        self.model = LanguageModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of token ids."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of token ids."""
        self.model.add_module("embedding", value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: GenerationState | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> GtJaxOutput:
        """Applies the model.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T or more], 0 for tokens to leave out: padding on either side.
            cache: of an earlier output, for the tokens before these.
            labels: [B, T], mostly input_ids themselves; -100 where nothing is to be predicted.
            kwargs: what transformers passes to every model and this one has no use for.
        """
        blocks = None if cache is None else cache.blocks
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if mask is None or mask.all():
            logits, blocks = self.model(input_ids, blocks)
        else:
            logits, blocks = self._without_padding(input_ids, blocks, mask)
        loss = None
        if labels is not None:  # as transformers has it for all models: shifted, -100 left out
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return GtJaxOutput(loss, logits, GenerationState(blocks))

    def _without_padding(self, tokens, blocks, mask):
        """As the model, row by row without the tokens that the mask leaves out."""
        if not mask.any(dim=1).all():
            raise ValueError("attention_mask leaves out every token of a row; drop that row")
        logits, after = [], []
        for i, (row, keep) in enumerate(zip(tokens, mask)):
            before = None if blocks is None else map_tensors(lambda x: x[i : i + 1], blocks)  # noqa: B023
            of_row, state = self.model(row[keep][None], before)
            logits.append(of_row.new_zeros(len(row), of_row.shape[-1]))
            logits[-1][keep] = of_row[0]
            after.append(state)
        return torch.stack(logits), map_tensors(lambda *rows: torch.cat(rows), *after)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict:
        """The arguments of forward: all tokens at first, then the last one with the state."""
        cache = kwargs.get("cache") or kwargs.get("past_key_values")
        if cache is not None:
            input_ids = input_ids[:, -1:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "cache": cache}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # Versions of transformers look for it under one name or the other.
        return model_kwargs | {"cache": outputs.cache, "past_key_values": outputs.cache}

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # a cache of keys and values; this model makes its own state
