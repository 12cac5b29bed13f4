"""How right the recurrences are that kernels.py times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.recurrences import COPIED, OPS

PER_TOKEN_AND_HEAD = ("o", "r", "k", "v", "w", "x", "dt")  # the output, and gradients
OLDEST_PORTABLE = "portable_sm80"


def run_ours(op, impl, **inputs):
    return call_ours(op, impl, inputs)[0]


def call_ours(op, impl, inputs, state=None):
    impl = "portable" if impl == OLDEST_PORTABLE else impl
    return OPS[op](**inputs, initial_state=state, impl=impl)


def one_head(arrays, o, shape):
    """What belongs to the middle head of the middle batch row: axes of 1, float64, by name."""
    return {name: cut(name, z, shape) for name, z in (arrays | {"o": o}).items()}


def cut(name, z, shape):
    row, head = shape[0] // 2, shape[2] // 2
    if name in ("u", "A", "D"):
        z = z[head : head + 1]
    elif name in ("B", "C"):  # shared by all heads
        z = z[row : row + 1]
    else:
        z = z[row : row + 1, :, head : head + 1]
    return np.asarray(z, np.float64)


def exact(op, head):
    """Output and gradients in float64, a token at a time, of one head's inputs and "o", its dO."""
    inputs = {name: z for name, z in head.items() if name != "o"}
    with jax.enable_x64(True):
        o, gradients = values_and_gradients(op, inputs, head["o"])
    return {name: np.asarray(z) for name, z in (gradients | {"o": o}).items()}


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(op, inputs, do):
    o, pull_back = jax.vjp(lambda inputs: run_ours(op, "reference", **inputs), inputs)
    return o, *pull_back(do)


def errors(found, known):
    """Relative RMS error of the output and of every gradient per token and head, by name."""
    return {
        name: float(np.linalg.norm(found[name] - known[name]) / np.linalg.norm(known[name]))
        for name in PER_TOKEN_AND_HEAD
        if name in known
    }


def errors_of_halves(op, impl, inputs):
    """Relative RMS distance of one call from two of half the tokens that follow each other: of the
    output "o", the state after it "state" and the gradients, by name."""
    half = inputs["v" if op == "wkv6" else "x"].shape[1] // 2

    def whole(inputs):
        return call_ours(op, impl, inputs)

    def halves(inputs):
        outputs, state = [], None
        for tokens in (slice(half), slice(half, None)):
            some = {k: z if k in COPIED else z[:, tokens] for k, z in inputs.items()}
            o, state = call_ours(op, impl, some, state)
            outputs.append(o)
        return jnp.concatenate(outputs, axis=1), state

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, inputs):
        keys = jax.random.split(jax.random.key(1))
        results, pull_back = jax.vjp(function, inputs)
        given = [jax.random.normal(key, z.shape, z.dtype) for key, z in zip(keys, results)]
        (gradients,) = pull_back(tuple(given))
        return dict(zip(("o", "state"), results)) | gradients

    @jax.jit
    def distance(found, known):
        found, known = (z.astype(jnp.float32) for z in (found, known))
        return jnp.sqrt(jnp.sum((found - known) ** 2) / jnp.sum(known**2))

    found, known = both(whole, inputs), both(halves, inputs)
    return {name: float(distance(found[name], known[name])) for name in found}
