"""Kernels that are told of as soon as each is lowered, so that they compile meanwhile.

Lowering a training step takes seconds of Python, most of it its kernels, one after another; XLA
gets the step at the end, and then compiles the kernels before anything else. Inside `telling`, a
kernel goes into a program as an operation of its own, which lowers to what the kernel itself
lowers to, and tells of it. The lowered program is the same.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir
from jaxlib.mlir import ir

_tell = contextvars.ContextVar("tell", default=None)


@contextlib.contextmanager
def telling(tell: Callable[[Any], None]) -> Iterator[None]:
    """Inside, in this thread, each kernel that is lowered is told of.

    A function that was jitted before keeps what it was traced as.

    Args:
        tell: gets the MLIR operation that calls the kernel, which is part of a module that grows.
    """
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def told() -> bool:
    """Whether the kernels of what is traced here are told of."""
    return _tell.get() is not None


def call(run: Callable, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """run(*arrays), a kernel's results, in a program that tells of the kernel."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return _kernel.bind(*arrays, jaxpr=jax.make_jaxpr(run)(*shapes))


def _batched(arrays, axes, *, jaxpr):
    results = jax.vmap(core.jaxpr_as_fun(jaxpr), in_axes=axes)(*arrays)
    return results, [0] * len(results)


def _lower(context, *arrays, jaxpr):
    results = mlir.lower_fun(core.jaxpr_as_fun(jaxpr), multiple_results=True)(context, *arrays)
    tell = _tell.get()
    if tell is not None:
        for operation in ir.InsertionPoint.current.block.operations:
            if operation.operation.name == "stablehlo.custom_call":
                tell(operation.operation)
    return results


_kernel = core.Primitive("kernel")
_kernel.multiple_results = True
_kernel.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
batching.primitive_batchers[_kernel] = _batched
mlir.register_lowering(_kernel, _lower)
