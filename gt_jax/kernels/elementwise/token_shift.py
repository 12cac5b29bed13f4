"""Blends of every token with the one before, by Pallas kernels on NVIDIA GPUs.

With d = x_{t-1} - x_t, blend j is x + d s_j of a share s_j = mu_j + hidden_j w_j for each channel.
Written in plain JAX each of them, and each gradient, reads and writes tensors as wide as the model
many times over; the kernels do so once. Blends of constant shares are left to XLA, which is faster.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas.devices import portable_unsupported

TOKENS, CHANNELS, RANK = 64, 64, 32  # whose multiples the kernels take


def fits(impl: str, x: jax.Array, rank: int) -> bool:
    """Whether `blends` takes a call: impl allows kernels, the GPU and the sizes suit them.

    Args:
        impl: as of the recurrences; "chunked" and "reference" take no kernels.
        x: [B, T, D].
        rank: of the products.
    """
    B, T, D = x.shape
    return (
        impl in ("auto", "mosaic", "portable")
        and x.dtype == jnp.bfloat16
        and T > 1
        and (B * T) % TOKENS == 0
        and D % CHANNELS == 0
        and rank % RANK == 0
        and portable_unsupported() is None
    )


def blends(
    x: jax.Array,
    last: jax.Array | None,
    resets: jax.Array | None,
    mu: jax.Array,
    hidden: jax.Array,
    w: jax.Array,
) -> list[jax.Array]:
    """The blends x + (before - x) s_j for every j; float32 inside, rounded once.

    Args:
        x: [B, T, D] bfloat16; see `fits`.
        last: [B, D] what stands before the first token, or None for zeros.
        resets: [B, T] bool, True where zeros stand before a token (never the first); or None.
        mu: [n, D] constant part of the shares.
        hidden: [B, T, n rank] bfloat16.
        w: [n, rank, D].

    Returns:
        n arrays [B, T, D] bfloat16.
    """
    B, T, D = x.shape
    starts = jnp.broadcast_to(jnp.arange(T) == 0, (B, T))
    starts = starts if resets is None else starts | resets
    keep = 1 - starts.astype(jnp.float32)
    flat = lambda z: z.reshape(B * T, z.shape[-1])
    outputs = _blends(flat(x), keep.reshape(-1), mu.astype(jnp.float32), flat(hidden), w)
    outputs = [y.reshape(B, T, D) for y in outputs]
    if last is None:
        return outputs
    first = x[:, 0].astype(jnp.float32)
    d = last.astype(jnp.float32) - first
    each = hidden[:, 0].reshape(B, len(mu), -1)
    products = jnp.einsum(
        "bnr,nrd->nbd", each, w.astype(x.dtype), preferred_element_type=jnp.float32
    )
    shares = mu[:, None].astype(jnp.float32) + products  # [n, B, D]
    return [y.at[:, 0].set((first + d * s).astype(y.dtype)) for y, s in zip(outputs, shares)]


@jax.custom_vjp
def _blends(x, keep, mu, hidden, w):
    return _forward(x, keep, mu, hidden, w)[0]


def _forward(x, keep, mu, hidden, w):
    from gt_jax.kernels.elementwise import token_shift_kernels as kernels

    outputs = kernels.blends(x, keep, mu, hidden, _ordered(w, x.dtype), tuning=kernels.TUNING)
    return tuple(outputs), (x, keep, mu, hidden, w)


def _backward(residuals, cotangents):
    from gt_jax.kernels.elementwise import token_shift_kernels as kernels

    x, keep, mu, hidden, w = residuals
    cotangents = list(cotangents)
    ordered = _ordered(w, x.dtype)
    dx, edges, dhidden = kernels.input_gradients(x, keep, mu, hidden, ordered, cotangents)
    # What the first token of a tile gives to the token before, which is the last of a tile.
    edges = jnp.pad(edges[1:, None], ((0, 1), (TOKENS - 1, 0), (0, 0))).reshape(x.shape)
    dx = (dx.astype(jnp.float32) + edges).astype(x.dtype)
    dmu, dw = kernels.parameter_gradients(x, keep, hidden, cotangents, tuning=kernels.TUNING)
    dw = jnp.sum(dw, axis=0).swapaxes(1, 2).astype(w.dtype)
    return dx, None, jnp.sum(dmu[..., 0], axis=0), dhidden, dw


_blends.defvjp(_forward, _backward)


def _ordered(w, dtype):
    """w [n, rank, D] as the kernels want it, [n rank, D]."""
    from gt_jax.kernels.elementwise.token_shift_layout import in_order_of_products

    w = in_order_of_products(in_order_of_products(w.astype(dtype), 1), 2)
    return w.reshape(-1, w.shape[-1])
