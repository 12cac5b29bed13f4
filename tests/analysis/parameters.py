"""Parameters of any module, drawn by NumPy: JAX would compile a program for every shape."""

import jax
import numpy as np


def random_parameters(module, *inputs):
    """N(0, 0.3) for every parameter, so that no zero hides anything."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    draw = lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return jax.tree.map(draw, shapes)
