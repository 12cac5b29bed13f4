"""The linear recurrence s_t = decay_t s_{t-1} + x_t of every channel, by Pallas kernels.

They run on NVIDIA GPUs; gt_jax/models/scans.py has the plain form. Each direction is one kernel
that reads its inputs once and writes its outputs once: 12 bytes a number forward (decay, x; s) and
20 backward (decay, s, ds; d decay, dx). At 8 x 2048 tokens of 192 channels that is 38 and 63 MB, or
9 and 15 microseconds at an H200's 4.2 TB/s. A long sequence of few channels is split, and
then a kernel before it reads two of the inputs once more.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas.devices import portable_unsupported

IMPLS = ("auto", "mosaic", "portable")  # model.impl that allows kernels
SHORTEST = 9  # tokens: fewer are one operation in the plain form
_ALIGNED = 4  # float32 numbers that a thread reads at once


def fits(impl: str, *arrays: jax.Array) -> bool:
    """Whether `scan` takes a call: impl allows kernels, the GPU and the arrays suit them.

    Args:
        impl: as of the recurrences; "chunked" and "reference" take no kernels.
        arrays: decay and x [B, T, C], state [B, C].
    """
    return (
        impl in IMPLS
        and arrays[0].shape[1] >= SHORTEST
        and all(z.dtype == jnp.float32 and z.size for z in arrays)
        and portable_unsupported() is None
    )


@jax.custom_vjp
def scan(decay: jax.Array, x: jax.Array, state: jax.Array) -> jax.Array:
    """s_t = decay_t s_{t-1} + x_t over axis 1.

    Args:
        decay, x: [B, T, C] float32; see `fits`.
        state: [B, C] float32, s before the first token.

    Returns:
        s [B, T, C] float32.
    """
    return _forward(decay, x, state)[0]


def _forward(decay, x, state):
    from gt_jax.kernels.pallas.launch import keep

    (s,) = keep(_call("forward", decay, x, state))
    return s, (decay, s, state)


def _backward(residuals, ds):
    decay, s, state = residuals
    d_decay, dx = _call("backward", decay, ds, s, state)
    return d_decay, dx, decay[:, 0] * dx[:, 0]


scan.defvjp(_forward, _backward)


def _call(name, *arrays):
    """A function of linear_scan_kernels.py, with the channels that threads read together."""
    from gt_jax.kernels.elementwise import linear_scan_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    channels = arrays[0].shape[-1]
    beyond = -channels % _ALIGNED
    if beyond:
        arrays = [jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, beyond)]) for z in arrays]
    results = batched_as_rows(getattr(linear_scan_kernels, name))(*arrays)
    return [z[..., :channels] for z in results] if beyond else list(results)
