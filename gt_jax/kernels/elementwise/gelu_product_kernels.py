"""The Pallas kernels of gelu_product.py.

Phi(x) to 2e-7 (Abramowitz and Stegun 1964, 7.1.26), with one exponential for value and slope:

    gelu(x) = x Phi(x),   gelu'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.pallas import row_functions, rows
from gt_jax.kernels.pallas.launch import kernel, lowered_once

_ROW = rows.Row(lanes=128, vector=8)
_SECTIONS = 4  # that a block of the grid reads at once: gelu_product.BLOCK numbers
_SERIES = 1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592


@lowered_once()
def value(x: jax.Array) -> list[jax.Array]:
    """gelu(x) of x in bfloat16, whose size is a multiple of gelu_product.BLOCK."""
    return _run("gelu", [x], 1, lambda x: [x * _normal_distribution(x)[0]])


@lowered_once()
def gradients(x: jax.Array, g: jax.Array) -> list[jax.Array]:
    """gelu(x), and g times its slope; both as x, as g is."""

    def compute(x, g):
        below, density = _normal_distribution(x)
        return [x * below, g * (below + x * density)]

    return _run("gelu_gradients", [x, g], 2, compute)


def _run(name, arrays, results, compute):
    shape, dtype = arrays[0].shape, arrays[0].dtype
    flat = arrays[0].size // _ROW.channels, _ROW.channels
    inputs = {f"in{i}": z.reshape(flat) for i, z in enumerate(arrays)}
    outputs = {f"out{i}": jax.ShapeDtypeStruct(flat, dtype) for i in range(results)}

    def body(refs):
        column, first = jnp.int32(0), lax.axis_index("blocks") * _SECTIONS
        given = [
            [rows.load(getattr(refs, f"{key}_gmem"), (first + n,), column, _ROW) for key in inputs]
            for n in range(_SECTIONS)
        ]
        for n, values in enumerate(given):
            found = compute(*(z.astype(jnp.float32) for z in values))
            for key, z in zip(outputs, found, strict=True):
                to = getattr(refs, f"{key}_gmem")
                rows.store(to, (first + n,), column, z.astype(dtype), _ROW)

    found = kernel(
        body,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scratch={},
        grid={"blocks": flat[0] // _SECTIONS},
        threads=1,
    )
    return [z.reshape(shape) for z in found]


def _normal_distribution(x):
    """Phi(x) and its slope, of float32 x."""
    power = jnp.exp2((-0.5 * math.log2(math.e)) * x * x)
    t = row_functions.reciprocal(1 + (0.3275911 * 0.5**0.5) * jnp.abs(x))
    series = t * _SERIES[0]
    for factor in _SERIES[1:]:
        series = t * (series + factor)
    tail = 0.5 * series * power
    return jnp.where(x >= 0, 1 - tail, tail), power * (2 * jnp.pi) ** -0.5
