"""Gradient of the Hopper SSD kernel: one pass over the chunks from the last to the first.

Per chunk, with dS the gradient of the state that leaves it, and everything the forward pass knows:

    dM = dy x^T                      (of the matrix that multiplies x; i reads j)
    dx = (L * C B^T * dt_j)^T dy + weight (B dS^T) + D dy
    dC = (L * dM * dt_j) B + (exp2(g) dy) S          summed over the heads of a group
    dB = (L * dM * dt_j)^T C + (weight x) dS         likewise
    dS <- exp2(g_end) dS + (exp2(g) dy)^T C

Squares are held transposed, [j, i], so that M^T is an operand in registers. The gradient of the log
decay sums the rectangle i >= t > j of L * C B^T * dt_j * dM by a product with ones, never as a
difference of sums.

There are two kernels, hopper_backward_bfloat16.py and hopper_backward_float32.py; what they share
is in hopper_chains.py (blocks that add to one sum) and in hopper_gradients.py.
"""

import jax

from gt_jax.kernels.pallas.launch import batched_as_rows, lowered_once
from gt_jax.kernels.ssd import hopper_backward_bfloat16, hopper_backward_float32
from gt_jax.kernels.ssd.hopper_chains import SUMS
from gt_jax.kernels.ssd.hopper_gradients import ROWS
from gt_jax.kernels.ssd.hopper_sizes import Sizes


def backward(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    states: jax.Array,
    dy: jax.Array,
    dstate: jax.Array | None,
    *,
    of_start: bool,
) -> tuple[jax.Array, ...]:
    """Gradients, of which the sums over chains and over time still have to be finished.

    Args:
        size: the call's Sizes.
        x: [B, T, H, P]; B, C: [B, T, G, N], bfloat16 or float32.
        g: [B, H, chunks, terms, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        states: [B, H, chunks / 2, P, N] bfloat16, the state every other chunk starts from, or
            [B, H, chunks, P, N] float32, of every chunk, where x is float32.
        dy: [B, T, H, P] as x; dstate: [B, H, P, N] float32, None for zeros.
        of_start: whether the gradient of the initial state is asked for.

    Returns:
        dx; dB and dC [B, chunks * CHUNK, chains, N] float32; the gradients of the step size and of
        the log decay [B, H, chunks, CHUNK]; dD [B, H, CHUNK]; with of_start the gradient of the
        initial state.
    """
    ends = () if dstate is None else (dstate,)

    @batched_as_rows
    def rows(x, *arrays):
        return _backward(size._replace(batch=x.shape[0]), of_start, x, *arrays)

    dx, sums, of_tokens, *others = rows(x, B, C, g, dt, D[None], states, dy, *ends)
    of_tokens = {name: of_tokens[..., n, :] for n, name in enumerate(ROWS)}
    dB, dC = (sums[:, n] for n in range(len(SUMS)))
    return dx, dB, dC, of_tokens["ddt"], of_tokens["da"], *others


@lowered_once("size", "of_start")
def _backward(size, of_start, x, B, C, g, dt, D, states, dy, dstate=None):
    inputs = {"x": x, "B": B, "C": C, "g": g, "dt": dt, "D": D}
    inputs |= {"states": states, "dy": dy, "dlast": dstate}
    kernels = {1: hopper_backward_bfloat16, 2: hopper_backward_float32}
    return kernels[size.terms].gradients(size, inputs, of_start=of_start)
