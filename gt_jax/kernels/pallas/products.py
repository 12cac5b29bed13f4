"""Matrix products on the tensor cores of a Hopper GPU (wgmma)."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.tiles import full, load


def matmul(*sums):
    """Sums of matrix products, all in flight at once.

    Each sum is (start, (a, b), (a, b), ...): `start` is a float32 value to add to, or the shape of
    a result that starts at zero; `a` is a value or a reference into shared memory, `b` a reference.
    Operands may be tuples of terms; `start` may then be a reference to the value.
    Returns one float32 value per sum.
    """
    inside, outside, products = [], [], []
    for start, *pairs in sums:
        products.append([product for pair in pairs for product in _products(*pair)])
        # Tensor cores round towards zero (Fasi et al. 2021, doi:10.7717/peerj-cs.330). Along a
        # sequence that error would grow to what two terms lose, so products of operands in several
        # terms are added to `start` afterwards.
        apart = not isinstance(start, tuple) and len(products[-1]) > len(pairs)
        inside.append(start.shape if apart else start)
        outside.append(start if apart else None)
    values = (_interpreted if interpreting() else _on_tensor_cores)(inside, products)
    return [z if start is None else _value(start) + z for start, z in zip(outside, values)]


def every_product(a, b):
    """Operands of all products of two terms each, of which matmul drops the smallest.

    For what enters the gradient of the log decay, which may be small beside its terms.
    """
    return [*zip(a[1:], b[1:]), (a, b)]


def _products(a, b):
    """Products of terms, the smallest first, without those that the terms' own rounding exceeds."""
    a, b = (z if isinstance(z, tuple) else (z,) for z in (a, b))
    kept = max(len(a), len(b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < kept]
    return [(a[i], b[j]) for i, j in sorted(pairs, key=sum, reverse=True)]


def _value(z):
    return z if isinstance(z, jax.Array) else load(z)


def _interpreted(starts, products):
    """The interpreter knows neither operands in registers nor started accumulators."""
    values = []
    for start, pairs in zip(starts, products):
        value = jnp.zeros(start, jnp.float32) if isinstance(start, tuple) else start
        for a, b in pairs:
            a, b = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
            value += jnp.dot(a, b, preferred_element_type=jnp.float32)
        values.append(value)
    return values


def _on_tensor_cores(starts, products):
    def issue(accumulators):
        for accumulator, pairs in zip(accumulators, products):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

    return pl.run_state(issue)(tuple(plgpu.ACC.init(_started(start)) for start in starts))


def _started(start):
    """The value that an accumulator starts from."""
    return full(start, 0, jnp.float32) if isinstance(start, tuple) else start
