"""Hybrids of RWKV-6 and Mamba-2, their branches alone and their baselines, as Flax modules."""

from gt_jax.models.config import ModelConfig
from gt_jax.models.fusion import FUSIONS
from gt_jax.models.language_model import (
    LanguageModel,
    Output,
    Params,
    confined_to_device,
    count_parameters,
    make_model,
)
from gt_jax.models.presets import ALIASES, PRESETS, make_config

__all__ = [
    "ALIASES",
    "FUSIONS",
    "PRESETS",
    "LanguageModel",
    "ModelConfig",
    "Output",
    "Params",
    "confined_to_device",
    "count_parameters",
    "make_config",
    "make_model",
]
