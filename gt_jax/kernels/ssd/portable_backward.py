"""Gradient of the portable SSD kernel, in three passes over the chunks.

Per chunk, with dS the gradient of the state that leaves it, L = exp2(g_i - g_j) where i >= j:

    dM = dy x^T                      (of the matrix that multiplies x; i reads j)
    dx = (L * C B^T * dt_j)^T dy + weight (B dS^T) + D dy
    dC = (L * dM * dt_j) B + (exp2(g) dy) S          summed over the heads of a group
    dB = (L * dM * dt_j)^T C + (weight x) dS         likewise
    dS <- exp2(g_end) dS + (exp2(g) dy)^T C

Only the last line ties chunks to each other. So three kernels run, and no block waits for another:

    of_reads   the second term of dC: a block has one chunk, and one head after the other;
    ends       walks the chunks of a head from the last to the first and keeps dS of each;
    of_inputs  dx, dB and the first term of dC, as of_reads.

A block adds dB and dC of its heads in registers, in a fixed order, so the bits are the same every
time; C B^T is computed once a block, as are the products of the summed gradient of C B^T. Squares
are held transposed, [j, i], so that M^T is a left operand. The gradient of the log decay sums the
rectangle i >= t > j of L * C B^T * dt_j * dM by a product with ones, never as a difference of sums.

The state that every other chunk starts from was saved; the one between follows from it. Nothing
else takes much memory: dS stands where dx will be and in the place of the saved states.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.ssd.hopper_sizes import Sizes
from gt_jax.kernels.ssd.portable_ends import ends
from gt_jax.kernels.ssd.portable_passes import INPUT_ROWS, of_inputs, of_reads


def backward(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    states: jax.Array,
    scales: jax.Array,
    dy: jax.Array,
    dstate: jax.Array | None,
    *,
    of_start: bool,
) -> tuple[jax.Array, ...]:
    """Gradients, the sums over blocks and over time still to be finished.

    Args:
        size: the call's Sizes; an even number of chunks.
        x: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        states, scales: of the state that every other chunk starts from, as `forward` saved them.
        dy: [B, T, H, P] as x; dstate: [B, H, P, N] float32, None for zeros.
        of_start: whether the gradient of the initial state is asked for.

    Returns:
        dx; dB and dC [B, T, sums, N] float32; the gradients of the step size and of the log decay
        [B, H, chunks, CHUNK]; dD [B, H, CHUNK]; with of_start the gradient of the initial state.
    """
    dC, read = of_reads(size, x, B, C, g, dt, states, scales, dy)
    carried, dstart, dx, states = ends(size, x, B, C, g, dt, states, scales, dy, dstate, read)
    dB, rows, dx, dC = of_inputs(size, x, B, C, g, dt, D, dy, dx, states, dC)
    of_step, of_decay, kept, of_D = (rows[..., n, :] for n in range(INPUT_ROWS))
    # A decay at t decays what is read at i >= t, what is kept from j < t, and all that is carried.
    until = np.tri(CHUNK, dtype=np.float32)  # [i, t]: t <= i
    sums = lambda row, over: jnp.matmul(row, over, precision=lax.Precision.HIGHEST)
    da = of_decay + sums(read, until) + sums(kept, 1 - until)
    da += jnp.sum(carried, axis=-1, keepdims=True)
    dD = jnp.sum(of_D, axis=2)
    return dx, dB, dC, of_step, da, dD, *((dstart,) if of_start else ())
