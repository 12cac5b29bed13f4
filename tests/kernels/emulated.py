"""Kernels compiled to PTX for a GPU that is not there, and run by ptx.py, in place of a launch."""

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gt_jax.kernels.pallas import devices, launch
from gt_jax.kernels.pallas.architectures import lowered_for
from tests.kernels import ptx

WHEELS = os.environ.get("GT_JAX_CUDA_WHEELS")  # a folder, as .ci/cross_compile.py takes it
CAPABILITY = (9, 0)


class Launcher:
    """Stands in for launch.kernel, for arrays that are no tracers.

    `change`, a function of PTX, breaks kernels; `names` has those that ran.
    """

    def __init__(self, folder: Path, setenv: Callable):
        sys.path.append(str(Path(__file__).parents[2] / ".ci"))
        import cross_compile

        setenv("COMPUTE_CAPABILITY", "".join(map(str, CAPABILITY)))
        setenv("MOSAIC_GPU_DUMP_PTX", "1")
        setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        self.tools, self.folder = cross_compile, folder
        self.compiler = cross_compile.prepare(Path(WHEELS))
        self.change, self.names = lambda text: text, []

    def kernel(self, body, *, name, inputs, outputs, grid, **options):
        """As launch.kernel."""
        given = {key: np.asarray(z) for key, z in inputs.items() if z is not None}
        results = [(z.shape, z.dtype) for z in outputs.values() if z is not None]

        def call(*arrays):
            arrays = dict.fromkeys(inputs) | dict(zip(given, arrays))
            kinds = {"name": name, "outputs": outputs, "grid": grid}
            return launch.kernel(body, inputs=arrays, **kinds, **options)

        shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in given.values()]
        (module,) = self.tools.calls_of(call, shapes, CAPABILITY, gradient=False)
        text, shared, order = self._compiled(module)
        self.names.append(name)
        blocks = math.prod(grid.values()) * options.get("cluster", 1)
        size = blocks, 128 * options["threads"]
        return ptx.execute(self.change(text), [*given.values()], results, *size, shared, order)

    def _compiled(self, module):
        """PTX, bytes of shared memory and the order of the parameters, of a serialised kernel."""
        found = self.tools.compiled(self.compiler, module)
        assert "error" not in found, found
        (text,), (passes,) = (
            [path.read_text(errors="replace") for path in self.folder.glob(f"*.{kind}")]
            for kind in ("ptx", "mlir-passes.log")
        )
        for path in self.folder.iterdir():
            path.unlink()
        # What the host's part passes: a kernel has its parameters in the order of their use.
        end = passes.index("gpu.launch_func")
        host, start = passes[passes.rindex("IR Dump", 0, end) : end], passes[end:].split("\n")[0]
        loads = dict(re.findall(r"(%\w+) = llvm.load (%\w+) : !llvm.ptr", host))
        places = re.findall(r"(%\w+) = llvm.getelementptr %\w+\[(\d+)\]", host)
        places = {pointer: int(n) for pointer, n in places}
        arguments = re.findall(r"(%\w+) : !llvm.ptr", start[start.index("args(") :])
        return text, found["shared"], [places.get(loads[z], 0) for z in arguments]


def call(function: Callable, *arrays: jax.Array | None) -> list:
    """A function of a kernel module, decorated with launch.lowered_once, not traced."""
    with devices.simulated("lower"), lowered_for(CAPABILITY):
        return function.__wrapped__(*arrays)
