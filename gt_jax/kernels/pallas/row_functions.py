"""Functions of what a row of threads holds (rows.py), float32, through fast instructions."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.devices import interpreting

_LOG2_E = 1.4426950408889634


def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32 value, right to about 2^-22."""
    return reciprocal(1 + jnp.exp2(x * -_LOG2_E))


def sigmoids(x, bias=None):
    """sigmoid(x + bias) and sigmoid(-x - bias); one less the first would be zero from 17 on."""
    power = exp_of_negative(x, bias)
    upper = reciprocal(1 + power)
    return upper, power * upper


def exp(x):
    """exp(x) of a float32 value."""
    return jnp.exp2(x * _LOG2_E)


def exp_of_negative(x, bias=None, most=125):
    """exp(-(x + bias)), at most 2^most: so that what is divided by it stays normal, even if rounded
    down. Other numbers are taken for zero."""
    power = x * -_LOG2_E if bias is None else x * -_LOG2_E + bias * -_LOG2_E
    return jnp.exp2(jnp.minimum(power, float(most)))


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
