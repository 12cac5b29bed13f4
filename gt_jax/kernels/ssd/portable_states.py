"""States as the forward pass of the portable SSD kernel saves them: in 16 bits, of which a scale
for each row of the state lets 11 be digits.

bfloat16 keeps 8. The gradient of the rate A sums over all tokens products with states; where the
sum cancels, their rounding would be seen. The 16 bits of float16 are held as those of bfloat16,
because the gradient puts numbers of bfloat16 in the same memory.
"""

import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.pallas import warps
from gt_jax.kernels.pallas.tiles import over_columns

_EXPONENT = 0x7F800000  # bits of it in a float32
_ONE = 0x3F800000
_LOWEST = 2.0**-100  # so that a scale and its inverse are normal numbers


def scaled(z):
    """float32 rows [rows, columns] -> as float16 and a power of two for each row.

    Returns:
        z / scale [rows, columns] float16, below 2; scale [rows] float32.
    """
    most = jnp.maximum(warps.row_maxima(jnp.maximum(z, -z)), _LOWEST)
    bits = lax.bitcast_convert_type(most, jnp.int32) & jnp.int32(_EXPONENT)
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    inverse = lax.bitcast_convert_type(jnp.int32(2 * _ONE) - bits, jnp.float32)
    return (z * over_columns(inverse, z.shape)).astype(jnp.float16), scale


def held(z):
    """float16 in the type of what memory holds."""
    return lax.bitcast_convert_type(z, jnp.bfloat16)


def float16(z):
    """What `held` was given."""
    return lax.bitcast_convert_type(z, jnp.float16)
