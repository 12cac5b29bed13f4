"""A product with what a kernel computes, which the kernel of its gradient computes again.

The gradient of the weights reads what was multiplied. To keep that takes memory, and another kernel
to compute it again reads the same as the one of the gradient, which has all of it at hand.
"""

from collections.abc import Callable

import jax


def projected(forward: Callable, backward: Callable) -> Callable:
    """A function of weights [C, D] and arrays: forward(*arrays) @ weights.

    Args:
        forward: function of the arrays -> [..., C] in the dtype of the weights.
        backward: function of the arrays and the cotangent [..., C] -> a list of what `forward`
            gives, and of the gradients of the arrays.
    """

    def value(weights, *arrays):
        x = forward(*arrays)
        return (x.reshape(-1, x.shape[-1]) @ weights).reshape(*x.shape[:-1], -1)

    def product_forward(weights, *arrays):
        # Not by `product`: policies of jax.checkpoint would not see what is a product in it.
        return value(weights, *arrays), (weights, arrays)

    def product_backward(residuals, g):
        weights, arrays = residuals
        tokens, g = g.shape[:-1], g.reshape(-1, g.shape[-1])
        x, *gradients = backward(*arrays, (g @ weights.T).reshape(*tokens, -1))
        return x.reshape(-1, x.shape[-1]).T @ g, *gradients

    product = jax.custom_vjp(value)
    product.defvjp(product_forward, product_backward)
    return product
