"""Cross-entropy of an output head, a chunk of tokens at a time: [N, V] logits are never held.

    nats = sum over counted tokens n of  logsumexp(x_n W) - (x_n W)[target_n]
    d nats / d (x_n W) = softmax(x_n W) - onehot(target_n)

The gradient of a weighted sum is known but for the weight, so the pass that makes a chunk's logits
makes its gradients too: three products a chunk, none of them repeated in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import softmax_loss

# Logits of a chunk: 256 MiB of float32.
_CHUNK = 2**26


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, kernels: bool = False
) -> jax.Array:
    """Summed cross-entropy of softmax(x head).

    Products, those of the gradient included, take operands in the dtype of x and accumulate in
    float32 (float64 for float64 x).

    Args:
        x: [N, D] in the computation dtype.
        head: [D, V] float32.
        targets: [N] int; below 0 they do not count, V or more make the sum NaN.
        kernels: whether the gradient may take a Pallas kernel, where one runs.

    Returns:
        Nats, [] float32 (float64 for float64 x).
    """
    weights = head.astype(x.dtype)

    def step(nats, chunk):
        x, targets = chunk
        return nats + _nats(_logits(x, weights), targets)[0], None

    return _over_chunks(step, jnp.zeros((), _wide(x)), x, targets, head.shape[1])[0]


def _forward(x, head, targets, kernels):
    weights, wide = head.astype(x.dtype), _wide(x)
    fused = kernels and not softmax_loss.unsupported(head.shape[1], x.dtype)
    of_logits = softmax_loss.nats_and_gradients if fused else _nats_and_gradients

    def step(sums, chunk):
        (nats, d_head), (x, targets) = sums, chunk
        more, d_logits = of_logits(_logits(x, weights), targets)
        d_logits = d_logits.astype(x.dtype)  # [n, V]
        dx = jnp.matmul(d_logits, weights.T, preferred_element_type=wide)
        d_head += jnp.matmul(x.T, d_logits, preferred_element_type=wide)
        return (nats + jnp.sum(more), d_head), dx

    sums = (jnp.zeros((), wide), jnp.zeros(head.shape, wide))
    (nats, d_head), dx = _over_chunks(step, sums, x, targets, head.shape[1])
    dtypes = (jnp.zeros((), x.dtype), jnp.zeros((), head.dtype))
    return nats, (dx.reshape(-1, x.shape[1])[: len(x)], d_head, dtypes)


def _nats_and_gradients(logits, targets):
    """As softmax_loss.nats_and_gradients: summed nats [], gradients in the dtype of logits."""
    nats, log_total, is_target = _nats(logits, targets)
    gradients = jnp.exp(logits - log_total) - is_target
    return nats, jnp.where(targets[:, None] >= 0, gradients, 0)


def _backward(kernels, residuals, g):
    del kernels
    *grads, dtypes = residuals
    dx, d_head = ((g * grad).astype(like.dtype) for grad, like in zip(grads, dtypes))
    return dx, d_head, None


head_cross_entropy.defvjp(_forward, _backward)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _logits(x, weights):
    return jnp.matmul(x, weights, preferred_element_type=_wide(x))  # [n, V]


def _nats(logits, targets):
    """Summed nats, and by token the logarithm of its sum [n, 1] and where its target is [n, V]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    log_total = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    # A masked sum instead of a gather: XLA computes it in the pass over the logits that it makes
    # for the sum above.
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    of_target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    of_target = jnp.where(targets < logits.shape[1], of_target, jnp.nan)
    return jnp.sum(log_total[:, 0] - of_target, where=targets >= 0), log_total, is_target


def _over_chunks(step, carry, x, targets, vocabulary):
    """Scan of step(carry, (x, targets)) over chunks of tokens; a single chunk is inlined."""
    chunks = -(-x.shape[0] * vocabulary // _CHUNK)
    if chunks <= 1:
        return step(carry, (x, targets))
    padding = -x.shape[0] % chunks
    x = jnp.pad(x, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding), constant_values=-1)
    split = (x.reshape(chunks, -1, x.shape[1]), targets.reshape(chunks, -1))
    return jax.lax.scan(step, carry, split)
