"""The Pallas kernel of softmax_loss.py: a block of threads holds all logits of a token.

So they are read once for their maximum, the sum of their exponentials and the gradient, which is
written in bfloat16.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.pallas import row_numbers, rows, warps
from gt_jax.kernels.pallas.launch import kernel, lowered_once

_ROW = rows.Row(lanes=128, vector=4)
_MOST_SECTIONS = 32  # of a token: 128 of a thread's 255 registers
_LOG2_E = math.log2(math.e)


def unsupported(vocabulary: int) -> str | None:
    """Why the kernel does not take so many logits of a token, or None."""
    sections, rest = divmod(vocabulary, _ROW.channels)
    if rest or sections > _MOST_SECTIONS:
        most = _MOST_SECTIONS * _ROW.channels
        return f"the fused softmax is for multiples of {_ROW.channels} up to {most} logits"
    return None


@lowered_once()
def nats_and_gradients(logits: jax.Array, targets: jax.Array) -> list[jax.Array]:
    """Cross-entropy [M, N] float32, and its gradient [M, N, V] bfloat16.

    Args:
        logits: [M, N, V] float32 of M models.
        targets: [M, N] int32; the gradient is zero where they are below 0.
    """
    models, tokens, vocabulary = logits.shape

    def body(refs):
        columns = [jnp.int32(c) for c in range(0, vocabulary, _ROW.channels)]
        token = lax.axis_index("models"), lax.axis_index("tokens")
        target = refs.targets_gmem[token]
        counted = target >= 0
        place = *token, jnp.clip(target, 0, vocabulary - 1)
        of_target = refs.logits_gmem[place]
        xs = [rows.load(refs.logits_gmem, token, c, _ROW) for c in columns]
        top = functools.reduce(jnp.maximum, xs)
        (top,) = rows.largest_over_row([top], _ROW, refs.numbers, jnp.int32(0))
        powers = [jnp.exp2((x - top) * _LOG2_E) for x in xs]
        total = sum(powers, rows.zeros(_ROW))
        (total,) = rows.sums_over_row([total], _ROW, refs.numbers, jnp.int32(1))
        inverse = 1 / total
        for c, power in zip(columns, powers):
            share = rows.masked(power * inverse, counted)
            rows.store(refs.d_gmem, token, c, share.astype(jnp.bfloat16), _ROW)
        below = of_target - top
        row_numbers.store(refs.nats_gmem, token, jnp.log(total) - below)
        # One number of the row is another: to select it among all would take longer.
        warps.sync()
        share = (jnp.exp2(below * _LOG2_E) * inverse - 1).astype(jnp.bfloat16)
        row_numbers.store(refs.d_gmem, place, share, counted & (target < vocabulary))

    return kernel(
        body,
        name="softmax_loss",
        inputs={"logits": logits, "targets": targets.astype(jnp.int32)},
        outputs={
            "nats": jax.ShapeDtypeStruct(targets.shape, jnp.float32),
            "d": jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16),
        },
        scratch={"numbers": rows.sums_scratch(1)},
        grid={"models": models, "tokens": tokens},
        threads=1,
    )
