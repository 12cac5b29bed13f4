"""The Pallas kernels of both recurrences as their tests call them."""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from gt_jax.kernels import ssd, wkv6
from gt_jax.kernels.cases import ssd_inputs, wkv6_inputs
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.ssd.hopper import ssd_mosaic
from gt_jax.kernels.ssd.reference import ssd_reference
from gt_jax.kernels.wkv6.hopper import wkv6_mosaic
from gt_jax.kernels.wkv6.reference import wkv6_reference

with devices.simulated("lower"):
    too_old = pytest.mark.skipif(
        bool(devices.hopper_unsupported()), reason=str(devices.hopper_unsupported())
    )


def _portable(op):
    """The implementation, loaded when called: an older JAX has not what its module needs."""
    load = lambda: importlib.import_module(f"gt_jax.kernels.{op}.portable")
    return lambda *arguments, **options: getattr(load(), f"{op}_portable")(*arguments, **options)


class Kernel(NamedTuple):
    """An operation, its kernel beside its reference, and inputs for both."""

    name: str
    arguments: tuple[str, ...]
    of_heads: tuple[str, ...]  # arguments that have neither a batch nor tokens
    operation: Callable
    implementations: dict[str, Callable]
    dtypes: dict[str, tuple[str, ...]]  # implementation -> those of what it multiplies
    make: Callable  # inputs of the operation, those of products of one of them, others float32
    per_token: Callable  # them -> inputs of an implementation
    released: dict[str, int]  # sizes that released models have, where they are not those of `make`

    def call(self, impl):
        """The operation with one implementation, of all of its inputs in order."""
        return lambda *arrays: self.operation(**dict(zip(self.arguments, arrays)), impl=impl)

    def public(self, impl):
        """`call` under jit, one function for all tests, so that it compiles once a shape."""
        return _public(self.name, impl)

    def run(self, impl, resets=None, **options):
        """An implementation itself, of all of its inputs in order."""
        return lambda *arrays: self.implementations[impl](*arrays, resets, "default", **options)


@functools.cache
def _public(name, impl):
    return jax.jit({"wkv6": WKV6, "ssd": SSD}[name].call(impl))


def _make_wkv6(
    regime="typical", batch=1, length=130, heads=2, K=64, V=64, seed=0, dtype="bfloat16"
):
    arrays = wkv6_inputs(regime, batch, length, heads, K, V, seed=seed)
    return _rounded(arrays, (0, 1, 2), dtype)


def _make_ssd(
    regime="typical", batch=1, length=130, heads=2, groups=1, N=64, seed=0, dtype="bfloat16"
):
    arrays = ssd_inputs(regime, batch, length, heads, groups, 64, N, seed=seed)
    return _rounded(arrays, (0, 3, 4), dtype)


def _rounded(arrays, multiplied, dtype):
    return tuple(
        jnp.asarray(z, dtype if n in multiplied else jnp.float32) for n, z in enumerate(arrays)
    )


WKV6 = Kernel(
    "wkv6",
    ("r", "k", "v", "w", "u", "initial_state"),
    ("u",),
    wkv6,
    {"mosaic": wkv6_mosaic, "portable": _portable("wkv6"), "reference": wkv6_reference},
    {"mosaic": ("bfloat16", "float32"), "portable": ("bfloat16",)},
    _make_wkv6,
    lambda inputs: inputs,
    {},
)
SSD = Kernel(
    "ssd",
    ("x", "dt", "A", "B", "C", "D", "initial_state"),
    ("A", "D"),
    ssd,
    {"mosaic": ssd_mosaic, "portable": _portable("ssd"), "reference": ssd_reference},
    {"mosaic": ("bfloat16", "float32"), "portable": ("bfloat16",)},
    _make_ssd,
    # The log decay of each token in place of the rate of each head, of which there are few.
    lambda inputs: (*inputs[:2], inputs[1] * inputs[2], *inputs[3:]),
    {"N": 128},
)

each_kernel_and_dtype = pytest.mark.parametrize(
    "kernel, impl, dtype",
    [
        pytest.param(kernel, impl, dtype, id=f"{kernel.name}-{impl}-{dtype}")
        for kernel in (WKV6, SSD)
        for impl, dtypes in kernel.dtypes.items()
        for dtype in dtypes
    ],
)
each_kernel = pytest.mark.parametrize(
    "kernel, impl",
    [
        pytest.param(kernel, impl, id=f"{kernel.name}-{impl}")
        for kernel in (WKV6, SSD)
        for impl in kernel.dtypes
    ],
)


def each_dtype(kernel):
    """Marks a test of every implementation of a kernel with every type that it takes."""
    pairs = [(impl, dtype) for impl, dtypes in kernel.dtypes.items() for dtype in dtypes]
    return pytest.mark.parametrize("impl, dtype", pairs)
