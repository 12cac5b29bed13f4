"""Measurements on a trained model."""

from gt_jax.analysis.ablation import (
    ablated_losses,
    ablations,
    apply_with_outputs,
    output_means,
)
from gt_jax.analysis.contributions import BlockMeasures, lowest_places, measure_block
from gt_jax.analysis.health import measure_health
from gt_jax.analysis.states import memories, norm
from gt_jax.analysis.trace import Trace, trace

__all__ = [
    "BlockMeasures",
    "Trace",
    "ablated_losses",
    "ablations",
    "apply_with_outputs",
    "lowest_places",
    "measure_block",
    "measure_health",
    "memories",
    "norm",
    "output_means",
    "trace",
]
