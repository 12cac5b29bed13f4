"""The two recurrences with inputs to time them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.kernels import ssd, wkv6

OPS = {"wkv6": wkv6, "ssd": ssd}
HEAD_SIZE = 64  # V of WKV6, P of SSD
STATE_SIZE = {"wkv6": 64, "ssd": 128}  # K and N, where a shape does not say


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def make_inputs(op, shape, key, multiplied="bfloat16"):
    """Arguments of an operation by name, and a gradient of its output."""
    B, T, H, size = shape
    keys = iter(jax.random.split(key, 8))

    def normal(*shape, dtype=multiplied):
        return jax.random.normal(next(keys), shape, dtype)

    def uniform(low, high, *shape):
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    do = normal(B, T, H, HEAD_SIZE)
    if op == "wkv6":
        r, k, v = normal(B, T, H, size), normal(B, T, H, size), normal(B, T, H, HEAD_SIZE)
        w = -jnp.exp(1.5 * normal(B, T, H, size, dtype=jnp.float32) - 2)
        return {"r": r, "k": k, "v": v, "w": w, "u": normal(H, size, dtype=jnp.float32)}, do
    inputs = {"x": normal(B, T, H, HEAD_SIZE)}
    inputs["dt"] = jnp.exp(uniform(np.log(1e-3), np.log(0.1), B, T, H))
    inputs["A"] = -uniform(1, 16, H)
    inputs |= {"B": normal(B, T, 1, size), "C": normal(B, T, 1, size)}
    return inputs | {"D": normal(H, dtype=jnp.float32)}, do
