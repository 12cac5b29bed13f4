"""Cross-entropy of logits and its gradient in one pass over them, by a Pallas kernel.

    nats = log(sum over v of exp(x_v)) - x_target;   d nats / d x = softmax(x) - onehot(target)

XLA reads the logits three times for the same: for their maximum, for the sum, for the gradient.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas.devices import portable_unsupported


def unsupported(vocabulary: int, dtype: str) -> str | None:
    """Why the kernel does not take a call, or None.

    Args:
        vocabulary: logits of a token.
        dtype: that the gradient is wanted in.
    """
    if reason := portable_unsupported():
        return reason
    if dtype != "bfloat16":
        return f"the fused softmax is for gradients in bfloat16; these are {dtype}"
    from gt_jax.kernels.elementwise import softmax_loss_kernels

    return softmax_loss_kernels.unsupported(vocabulary)


def nats_and_gradients(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each token, and its gradient.

    Args:
        logits: [N, V] float32; see `unsupported`.
        targets: [N] int32; below 0 they do not count.

    Returns:
        nats [N] float32 and the gradient [N, V] bfloat16, both zero where a target does not count.
        Where a target is V or more, nats are NaN.
    """
    from gt_jax.kernels.elementwise import softmax_loss_kernels
    from gt_jax.kernels.pallas.launch import of_models

    nats, gradients = of_models(softmax_loss_kernels.nats_and_gradients)(logits, targets)
    nats = jnp.where(targets < logits.shape[1], nats, jnp.nan)
    return jnp.where(targets >= 0, nats, 0), gradients
