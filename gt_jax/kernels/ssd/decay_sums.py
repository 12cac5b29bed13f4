"""Sums of log decays of SSD, and step sizes, as its kernels read them: head by head.

A thread owns a head and a chunk. It reads the chunk's tokens one after the other, its neighbours
the heads beside; what it has of a few tokens it writes side by side.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import row_numbers, rows
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.ssd.hopper_sizes import Sizes

# exp of this is 0 in float32, and a chunk's sum of it is finite
_LOWEST_LOG_DECAY = -104.0
_LOG2_E = math.log2(math.e)
_WRITTEN = 4  # tokens that a thread writes together, 16 bytes
_READ = 16  # tokens that it reads before it needs the first


@lowered_once("size")
def decay_sums(size: Sizes, dt: jax.Array, a: jax.Array) -> list[jax.Array]:
    """Running sums g of log2 decays in each chunk, and step sizes.

    With g, exp2(g_i - g_j) is what passes from token j to i >= j. Two terms are the sums of whole
    numbers, which are exact, and of what is left, which are small: where one decay is strong, the
    differences of other sums would lose digits that float32 needs.

    Args:
        size: of the call.
        dt: [B, T, H] float32 step sizes.
        a: [B, T, H] float32 log decay, at most 0; -inf forgets everything. Or [H] rates;
            the log decay is then dt a.

    Returns:
        g [B, H, chunks, terms, CHUNK] and dt [B, H, chunks, CHUNK], float32. Tokens past the end
        decay nothing, and their step size is 0.
    """
    lanes = next(n for n in (32, 16, 8, 4, 2, 1) if size.heads % n == 0)
    row, slabs = rows.Row(lanes, 1), size.heads // lanes
    number = size.batch * size.chunks * slabs
    whole = size.length % CHUNK == 0

    def body(refs):
        n = lax.axis_index("block") * row.number + rows.own_row(row)
        keep = n < number
        place, slab = divide(jnp.minimum(n, number - 1), slabs)
        b, m = divide(place, size.chunks)
        head = slab * row.channels
        rate = rows.load(refs.a_gmem, (), head, row) if a.ndim == 1 else None

        def read(t):
            inside = None if whole else t < size.length
            t = t if whole else jnp.minimum(t, size.length - 1)
            step = rows.load(refs.dt_gmem, (b, t), head, row, inside)
            if rate is not None:
                return step, step * rate
            return step, rows.load(refs.a_gmem, (b, t), head, row, inside)

        def tokens(k, sums):
            first = k * _READ
            found = [read(m * CHUNK + first + n) for n in range(_READ)]
            steps, sums_of = [step for step, _ in found], []
            for _, decay in found:
                decay = jnp.maximum(decay, _LOWEST_LOG_DECAY) * _LOG2_E
                integer = jnp.round(decay) if size.terms == 2 else None
                terms = (decay,) if integer is None else (integer, decay - integer)
                sums = tuple(z + term for z, term in zip(sums, terms))
                sums_of.append(sums)
            for n in range(0, _READ, _WRITTEN):
                t, part = first + n, slice(n, n + _WRITTEN)
                row_numbers.store_across(
                    refs.steps_gmem, (b, head, m, t), 1, steps[part], row, keep
                )
                for term, values in enumerate(zip(*sums_of[part])):
                    at = (b, head, m, jnp.int32(term), t)
                    row_numbers.store_across(refs.g_gmem, at, 1, values, row, keep)
            return sums

        loop(CHUNK // _READ, tokens, (rows.zeros(row),) * size.terms)

    by_chunk = size.batch, size.heads, size.chunks
    return kernel(
        body,
        name="ssd_decay_sums",
        inputs={"dt": dt, "a": a},
        outputs={
            "g": jax.ShapeDtypeStruct((*by_chunk, size.terms, CHUNK), jnp.float32),
            "steps": jax.ShapeDtypeStruct((*by_chunk, CHUNK), jnp.float32),
        },
        scratch={},
        grid={"block": pl.cdiv(number, row.number)},
        threads=1,
    )
