"""Where a fusion's gate starts: RWKV's share of the sum, and the bias that gives it."""

import math
from typing import Protocol

from gt_jax.models.config import ModelConfig


class Configured(Protocol):
    """A module of a model, as every fusion is."""

    @property
    def config(self) -> ModelConfig: ...


def initial_share(fusion: Configured) -> float:
    """RWKV's share at initialisation, in (0, 1), of a fusion module.

    It is config.gate_init if set, else the fusion's own `default_share`, else one half.
    """
    given = fusion.config.gate_init
    return getattr(fusion, "default_share", 0.5) if given is None else given


def logit(share: float | None) -> float:
    """The bias whose sigmoid is `share`, in (0, 1); None means one half."""
    return 0.0 if share is None else math.log(share / (1 - share))
