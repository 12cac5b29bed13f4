"""The two recurrences with inputs to time them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.lab.programs import LOWERING
from gt_jax.kernels import ssd, wkv6

OPS = {"wkv6": wkv6, "ssd": ssd}
HEAD_SIZE = 64  # V of WKV6, P of SSD
STATE_SIZE = {"wkv6": 64, "ssd": 128}  # K and N, where a shape does not say
COPIED = ("u", "A", "D")  # inputs that have no tokens


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


def compile_recurrence(op, shape, cards, impl):
    """A recurrence, forward and backward, on some devices that share its tokens.

    Args:
        op: of OPS. shape: for `make_inputs`. cards: how many devices. impl: of the recurrence.

    Returns:
        compiled (inputs, do) -> (output, gradients), and the shardings of its arguments.
    """
    axis = "sequence" if cards > 1 else None
    mesh = jax.make_mesh(
        (cards,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:cards]
    )
    make = functools.partial(make_inputs, op, shape)
    inputs, do = jax.eval_shape(make, jax.random.key(0))
    tokens = P(None, "sequence")
    specs = {name: P() if name in COPIED else tokens for name in inputs}

    def forward(inputs):
        return OPS[op](**inputs, impl=impl, axis_name=axis)[0]

    if axis:
        forward = jax.shard_map(
            forward, mesh=mesh, in_specs=(specs,), out_specs=tokens, check_vma=False
        )

    def both(inputs, do):
        y, backward = jax.vjp(forward, inputs)
        return y, backward(do)[0]

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), (specs, tokens), is_leaf=lambda x: isinstance(x, P)
    )
    with LOWERING:
        lowered = jax.jit(both, in_shardings=shardings).lower(inputs, do)
    return lowered.compile(), shardings


@jax.jit
def largest_difference(found, known):
    """The largest relative RMS difference of the arrays of two trees."""

    def of(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return jnp.stack(jax.tree.leaves(jax.tree.map(of, found, known))).max()
