"""Functions of what a row of threads holds (rows.py), float32, through fast instructions."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.devices import interpreting

_LOG2_E = 1.4426950408889634


def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32 value, right to about 2^-22."""
    return reciprocal(1 + jnp.exp2(x * -_LOG2_E))


def sigmoids(x):
    """sigmoid(x) and sigmoid(-x); 1 - sigmoid(x) would round to zero from x = 17 on."""
    # exp(-x), finite, and its reciprocal normal even if rounded down: others are taken for zero.
    power = jnp.exp2(jnp.minimum(x * -_LOG2_E, 125.0))
    upper = reciprocal(1 + power)
    return upper, power * upper


def reciprocal(y):
    """1 / y of a float32 value, right to about 2^-23."""
    if interpreting():
        return 1 / y

    @plgpu.inline_mgpu(
        arg_types=(rows._layout(rows._vector(y)),),
        return_type=rows._value(jnp.float32, rows._vector(y)),
    )
    def approximate(_, y):
        return y._pointwise(y._lift_fast_instr("rcp.approx.ftz.f32"))

    return approximate(y)
