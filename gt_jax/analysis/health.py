"""What a model's numbers look like on a text: spread of activations, its guesses, its memories."""

from typing import Any

import jax
import jax.numpy as jnp

from gt_jax.analysis.states import memories, norm
from gt_jax.models import LanguageModel, Params


def measure_health(
    model: LanguageModel,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Measures of a model of L blocks on tokens [B, T], each row from its start.

    Args:
        model, params: from `gt_jax.load`.
        tokens: [B, T] int.
        segment_ids: [B, T] int, as for a call of the model.

    Returns:
        Float32 arrays: entropy (nats) and top (the largest probability) [], means over positions of
        the predicted distribution; stream_variance [L] of the residual stream after each block;
        PART_variance [L] of a branch's output, of hybrids, over all of its entries; PART_state_norm
        [L] of a memory after the last token, mean over rows.
    """
    output, sown = model.apply(
        {"params": params},
        tokens,
        segment_ids=segment_ids,
        capture_intermediates=_is_block,
        mutable=["activations", "intermediates"],
    )
    log_p = jax.nn.log_softmax(output.logits)  # [B, T, V]
    found = {
        "entropy": -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1)),
        "top": jnp.mean(jnp.exp(jnp.max(log_p, axis=-1))),
    }
    blocks = [f"blocks_{layer}" for layer in range(model.config.layers)]
    variance = lambda arrays: jnp.stack([jnp.var(x.astype(jnp.float32)) for x in arrays])
    outputs = (sown["intermediates"][block]["__call__"][0][0] for block in blocks)
    found["stream_variance"] = variance(outputs)
    recorded: Any = sown.get("activations", {})
    if "rwkv_out" in recorded.get(blocks[0], {}):
        for part in ("rwkv", "mamba"):
            arrays = (recorded[block][f"{part}_out"][0] for block in blocks)
            found[f"{part}_variance"] = variance(arrays)
    states = [memories(state) for state in output.state]
    for part in states[0]:
        norms = [jnp.mean(norm(state[part])) for state in states]
        found[f"{part}_state_norm"] = jnp.stack(norms)
    return found


def _is_block(module, method):
    return method == "__call__" and (module.name or "").startswith("blocks_")
