"""Pallas kernels of a lowered program as programs of their own.

XLA compiles the kernels of a program one after another, which takes half of its thread's time
(configs/gf_mh.py), but those of several programs side by side. A process keeps what it has
compiled: the large program finds the kernels that small ones brought in meanwhile.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# What a Pallas kernel for a GPU is in a lowered program, and how its numbers' types are written.
_KERNEL = "mosaic_gpu_v2"
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(bf|f|i|ui)(8|16|32|64)>")
_TYPES = {"bf": "bfloat", "f": "float", "i": "int", "ui": "uint"}


class Kernel(NamedTuple):
    """A kernel as a program."""

    hash: bytes  # by which XLA knows it
    program: Any  # a jitted function
    arguments: list  # their shapes
    size: int  # bytes of what is compiled


def of_program(lowered: jax.stages.Lowered) -> list[Kernel]:
    """All of a lowered program, the largest first."""
    found = {}
    for call in _calls(lowered):
        kernel = of_call(call)
        if kernel is not None:
            found[kernel.hash] = kernel
    return sorted(found.values(), key=lambda kernel: -kernel.size)


def of_call(call: Any) -> Kernel | None:
    """The kernel that an MLIR operation calls, None if it calls none or its numbers are unknown."""
    if _KERNEL not in str(call.attributes["call_target_name"]):
        return None
    shapes = [_shape(x.type) for x in (*call.operands, *call.results)]
    known = [x for x in shapes if x is not None]
    if len(known) < len(shapes):
        return None
    arguments, results = known[: len(call.operands)], known[len(call.operands) :]
    config = {entry.name: entry.attr for entry in call.attributes["mhlo.backend_config"]}
    config = {name: getattr(x, "value_bytes", None) or x.value for name, x in config.items()}
    run = jax.ffi.ffi_call(_KERNEL, results)
    program = jax.jit(lambda *arrays: run(*arrays, **config))
    return Kernel(config["kernel_hash"], program, arguments, len(config["module"]))


def calls_of(lowered: jax.stages.Lowered) -> set[str]:
    """The names of what a lowered program calls outside of XLA."""
    return {call.attributes["call_target_name"].value for call in _calls(lowered)}


def _calls(lowered: jax.stages.Lowered) -> Iterator[Any]:
    module = lowered.compiler_ir()
    assert module is not None  # JAX lowers to MLIR alone
    for operation in _operations(module.operation):
        if operation.name == "stablehlo.custom_call":
            yield operation


def _operations(parent: Any) -> Iterator[Any]:
    """All operations inside an MLIR operation."""
    for region in parent.regions:
        for block in region:
            for operation in block:
                yield operation
                yield from _operations(operation)


def _shape(tensor: Any) -> jax.ShapeDtypeStruct | None:
    """Of an MLIR type, None if it is not an array of common numbers."""
    known = _TENSOR.fullmatch(str(tensor))
    if known is None:
        return None
    sizes, kind, bits = known.groups()
    return jax.ShapeDtypeStruct(tuple(map(int, sizes.split("x")[:-1])), _TYPES[kind] + bits)
