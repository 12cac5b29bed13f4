"""How the tests of the recurrences compare: against the definition, evaluated in float64.

Inputs are rounded to the type under test first, so both sides see the same numbers; random
cotangents sit on the output and on the final state at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Relative root-mean-square error allowed. bfloat16 rounds its results alone to 1.7e-3; the rest is
# the rounding of matmul operands. float32 and float64 are a few units in the last place of sums.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 4e-3}


def relative_rms(out, ref):
    """rms(out - ref) / rms(ref) in float64; absolute where ref is below what float32 can hold."""
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert out.shape == ref.shape
    assert np.isfinite(out).all()
    scale = np.sqrt(np.mean(ref**2))
    error = np.sqrt(np.mean((out - ref) ** 2))
    return error / scale if scale > np.finfo(np.float32).tiny else error


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(function, inputs, cotangents):
    """(outputs, gradients): function(*inputs) -> (output, final state), pulled back."""
    outputs, pull_back = jax.vjp(function, *inputs)
    cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs))
    return outputs, pull_back(cotangents)


def random_cotangents(function, inputs, seed=1):
    """Normal cotangents for both outputs, exact in every float type."""
    rng = np.random.default_rng(seed)
    shapes = [x.shape for x in jax.eval_shape(function, *inputs)]
    return tuple(jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)


def errors(candidate, reference, inputs, names):
    """Relative RMS error of both outputs and of every gradient against float64, by name."""
    cotangents = random_cotangents(reference, inputs)
    out = jax.tree.leaves(values_and_gradients(candidate, inputs, cotangents))
    exact_inputs = tuple(jnp.asarray(x, jnp.float64) for x in inputs)
    ref = jax.tree.leaves(values_and_gradients(reference, exact_inputs, cotangents))
    names = ("output", "final_state", *(f"d_{name}" for name in names))
    return {name: relative_rms(o, r) for name, o, r in zip(names, out, ref, strict=True)}


def assert_accurate(candidate, reference, inputs, names, dtype):
    """Every value and gradient is within the tolerance of `dtype`."""
    found = errors(candidate, reference, inputs, names)
    wrong = {name: f"{e:.1e}" for name, e in found.items() if not e <= TOLERANCE[dtype]}
    assert not wrong, f"beyond {TOLERANCE[dtype]:.0e}: {wrong}"
