"""What each branch of a hybrid block adds to the residual stream, token by token.

    fused = R + M       share = |R| / (|R| + |M|)       cosine = rwkv . mamba / (|rwkv| |mamba|)

R is RWKV's part: what the fusion records as from_rwkv, else g rwkv if it has one gate g per
position, else its output for rwkv and a zero mamba. M is the rest of the sum, Mamba's part. With
model.residual a part holds the input that its branch adds; the cosine is of the outputs alone. What
a model loses without a branch, whatever joins them, is another question: see experiments/paradox.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.models import FUSIONS, ModelConfig, Params
from gt_jax.models.hybrid import with_residuals


class BlockMeasures(NamedTuple):
    """Measures of one block, each [B, T] float32; NaN where a branch's output is zero.

    gate: weight of the RWKV branch, averaged over channels; None for fusions without one.
    share: RWKV's part of the update, in [0, 1]; Mamba's is 1 - share.
    cosine: between the branches' outputs, in [-1, 1].
    rwkv_norm, mamba_norm: |R| and |M|.
    """

    gate: jax.Array | None
    share: jax.Array
    cosine: jax.Array
    rwkv_norm: jax.Array
    mamba_norm: jax.Array


def measure_block(
    config: ModelConfig, fusion_params: Params, activations: Mapping[str, Any]
) -> BlockMeasures:
    """The BlockMeasures of a hybrid block.

    Args:
        config: the ModelConfig.
        fusion_params: the block's parameters under "fusion"; empty for a fusion without any.
        activations: what the block sowed: rwkv_out, mamba_out, block_input (with model.residual)
            and fused [B, T, D]; what its fusion recorded.
    """
    rwkv, mamba, fused = (
        activations[name][0].astype(jnp.float32) for name in ("rwkv_out", "mamba_out", "fused")
    )
    read = activations["rwkv_out"][0]  # by the fusion
    if config.residual != "none":
        outputs = (activations[name][0] for name in ("rwkv_out", "mamba_out", "block_input"))
        read, _ = with_residuals(config, *outputs)
    recorded = activations.get("fusion", {})
    gate = recorded.get("gate", [None])[0]
    if "from_rwkv" in recorded:
        from_rwkv = recorded["from_rwkv"][0].astype(jnp.float32)
    elif gate is not None and gate.ndim == rwkv.ndim:  # one a position
        from_rwkv = gate * read.astype(jnp.float32)
    else:
        fusion = FUSIONS[config.fusion](config)
        from_rwkv, _ = fusion.apply({"params": fusion_params}, read, jnp.zeros_like(read))
    rwkv_norm = jnp.linalg.norm(from_rwkv, axis=-1)  # [B, T]
    mamba_norm = jnp.linalg.norm(fused - from_rwkv, axis=-1)
    if gate is not None:
        gate = jnp.broadcast_to(jnp.mean(gate, axis=-1), rwkv_norm.shape)
    lengths = jnp.linalg.norm(rwkv, axis=-1) * jnp.linalg.norm(mamba, axis=-1)
    return BlockMeasures(
        gate=gate,
        share=rwkv_norm / (rwkv_norm + mamba_norm),
        cosine=jnp.sum(rwkv * mamba, axis=-1) / lengths,
        rwkv_norm=rwkv_norm,
        mamba_norm=mamba_norm,
    )


def lowest_places(values: np.ndarray | Sequence[float], *, count: int, apart: int) -> list[int]:
    """Where values [T] are lowest, lowest first: at most `count` places, `apart` or more apart."""
    places = []
    for place in np.argsort(values, kind="stable"):
        if len(places) == count or np.isnan(values[place]):
            break
        if all(abs(place - other) >= apart for other in places):
            places.append(int(place))
    return places
