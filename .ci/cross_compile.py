"""Compiles every Pallas kernel to machine code for GPUs that are not there, on any machine.

    pip install --no-deps --target FOLDER jax-cuda12-pjrt==JAX jax-cuda12-plugin==JAX \
        nvidia-cuda-nvcc-cu12==12.9.86
    python .ci/cross_compile.py --wheels FOLDER [--gpus 8.0 9.0] [--write TABLE.md]

with the version of JAX that is installed; needs a C compiler. JAX's CUDA plugin exports
MosaicGpuCompile, for its own bridge to PyTorch, which asks the driver for the compute capability
and nothing else: stub_libcuda.c answers. NVIDIA's assembler refuses what a GPU has not, and reports
registers and spills. Prints a table; fails where a kernel does not compile, spills more bytes a
thread than MOST_SPILLED, or takes more shared memory than a block may have, and where
gt_jax/kernels/COMPILED.md, written with the same JAX, says something else.
"""

import argparse
import concurrent.futures
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import stream_and_arbiters
from compiled_table import GPUS, TABLE, as_table, outdated

HOPPER = "9.0"
SHARED_MEMORY = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}  # KiB
# Bytes a thread, on the GPU where it is most; a few percent above what was found.
MOST_SPILLED = {
    "Branches, gated_blend, backward, 768 channels": 40,
    "Gated scan, backward, 8 x 2048 x 192": 30,
    "Gated scan, backward, 8 x 2048 x 128": 160,
    "Memory scan, backward, 8 x 2048 x 128": 160,
    "Blends, gradients by input": 90,
    "WKV6 portable, forward": 40,
    "WKV6 portable, forward that saves": 40,
    "WKV6 portable, backward": 1180,
    "SSD portable, forward": 480,
    "SSD portable, forward that saves": 480,
    "SSD portable, backward, of reads": 200,
    "SSD portable, backward, ends": 130,
    "SSD portable, backward, of inputs": 420,
    "SSD portable, splits, forward": 60,
    "WKV6 Hopper, forward": 60,
    "WKV6 Hopper, forward that saves": 80,
    "WKV6 Hopper, backward": 500,
    "SSD Hopper, backward": 220,
    "SSD Hopper, splits, forward": 20,
    "WKV6 Hopper, float32, forward": 180,
    "WKV6 Hopper, float32, forward that saves": 180,
    "WKV6 Hopper, float32, backward": 340,
    "SSD Hopper, float32, forward that saves": 20,
    "SSD Hopper, float32, backward": 980,
    "SSD Hopper, float32, splits, forward": 20,
}

# name -> (operation, implementation, dtype); the Hopper kernels are for 9.0 alone
VARIANTS = {
    "WKV6 portable": ("wkv6", "portable", "bfloat16"),
    "SSD portable": ("ssd", "portable", "bfloat16"),
    "WKV6 Hopper": ("wkv6", "mosaic", "bfloat16"),
    "SSD Hopper": ("ssd", "mosaic", "bfloat16"),
    "WKV6 Hopper, float32": ("wkv6", "mosaic", "float32"),
    "SSD Hopper, float32": ("ssd", "mosaic", "float32"),
    "Blends": ("blends", "portable", "bfloat16"),
    "Head norm": ("head_norm", "portable", "bfloat16"),
}
# Kernels in the order they run, of what is no recurrence.
OTHERS = {
    "blends": ("forward", "gradients by input", "gradients by parameters"),
    "head_norm": ("forward", "backward"),
}

# Names of the kernels of a backward pass, by their number
BACKWARD = {
    1: ["backward"],
    3: ["backward, of reads", "backward, ends", "backward, of inputs"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheels", type=Path, required=True, help="where the wheels are unpacked")
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument("--write", type=Path, help="file that gets the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process serves one GPU
    options = parser.parse_args()
    if options.one:
        json.dump(compile_all(options.one, options.wheels), sys.stdout)
        return 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        longest_first = sorted(options.gpus, key=lambda gpu: gpu != HOPPER)
        found = dict(zip(longest_first, pool.map(lambda g: run_for(g, options), longest_first)))
    rows = [row for gpu in options.gpus for row in found[gpu]]
    table = as_table(rows)
    print(table)
    faults = [fault for row in rows for fault in faults_of(row)]
    if options.write:
        options.write.write_text(table + "\n")
    else:
        faults += outdated(table, TABLE.read_text())
    print("\n".join(faults))
    return bool(faults)


def run_for(gpu, options):
    command = [sys.executable, __file__, "--one", gpu, "--wheels", str(options.wheels.resolve())]
    environment = os.environ | {"COMPUTE_CAPABILITY": gpu.replace(".", ""), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def compile_all(gpu, wheels):
    """Rows of the table of one GPU."""
    compiler = prepare(wheels)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    rows = []
    capability = tuple(map(int, gpu.split(".")))
    found = [*mamba2_kernels(capability), *stream_and_arbiters.kernels(calls_of, capability)]
    for variant, (op, impl, dtype) in VARIANTS.items():
        if impl == "portable" or gpu == HOPPER:
            of_variant = kernels(op, impl, dtype, capability)
            found += [(f"{variant}, {kernel}", module) for kernel, module in of_variant]
    for kernel, module in found:
        row = {"gpu": gpu, "kernel": kernel} | compiled(compiler, module)
        print(row, file=sys.stderr)
        rows.append(row)
    return rows


def prepare(wheels):
    """The plugin's compile function, with a stub driver beneath."""
    assembler = wheels / "nvidia/cuda_nvcc/bin"
    runtime = wheels / "jax_cuda12_plugin/libmosaic_gpu_runtime.so"
    os.environ |= {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(runtime),
        "PATH": f"{assembler}:{os.environ['PATH']}",
    }
    stub = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    source = Path(__file__).parent / "stub_libcuda.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, source], check=True
    )
    ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    plugin = ctypes.CDLL(str(wheels / "jax_plugins/xla_cuda12/xla_cuda_plugin.so"))
    compiler = plugin.MosaicGpuCompile
    compiler.argtypes, compiler.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    return compiler


def kernels(op, impl, dtype, capability):
    """(name, serialised kernel) of everything that an implementation may launch."""
    if op in OTHERS:
        yield from zip(OTHERS[op], lowered(op, impl, dtype, capability, (8, 4096, 12)), strict=True)
        return
    many, few = (8, 4096, 64), (1, 8192, 2)  # enough heads, or the sequence is split
    *sums, forward = lowered(op, impl, dtype, capability, many, gradient=False)
    yield from (("sums of log decays", z) for z in sums)  # of SSD
    yield "forward", forward
    saving, *backward = lowered(op, impl, dtype, capability, many)[len(sums) :]
    yield "forward that saves", saving
    yield from zip(BACKWARD[len(backward)], backward, strict=True)
    forwards, _, backwards, *_ = lowered(op, impl, dtype, capability, few)[len(sums) :]
    yield "splits, forward", forwards
    yield "splits, backward", backwards


def mamba2_kernels(capability):
    """(name, serialised kernel) of what Mamba-2's mixer launches beside its recurrence."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import causal_conv
    from gt_jax.kernels.elementwise.gated_norm import gated_norm

    found, names = [], ("conv, forward", "norm, forward", "norm, backward", "conv, backward")
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    for inner, documents in ((1536, True), (384, False), (2048, False)):
        sizes, tokens = causal_conv.Sizes(inner, 128, inner // 64), (16, 2048)
        parameters = (sizes.channels, 4), (sizes.channels,), (inner,)
        weight, bias, scale = (array(*shape, dtype=jnp.float32) for shape in parameters)

        def mixer(projected, weight, bias, y, scale, sizes=sizes, documents=documents):
            seen = jnp.zeros(y.shape[:2], jnp.int32) if documents else None
            z, *parts = causal_conv.split_and_convolve(sizes, projected, weight, bias, seen)
            return parts, gated_norm(1e-5, y, z, scale)

        projected, y = array(*tokens, sizes.padded_width), array(*tokens, inner)
        calls = calls_of(mixer, [projected, weight, bias, y, scale], capability)
        kind = f"{inner} channels" + (", documents" if documents else "")
        found += [(f"Mamba-2 {name}, {kind}", z) for name, z in zip(names, calls, strict=True)]
    return found


def lowered(op, impl, dtype, capability, shape, *, gradient=True):
    """Serialised kernels of one call in the order they run."""
    import jax
    import jax.numpy as jnp

    from gt_jax import kernels
    from gt_jax.kernels.elementwise import head_norm, token_shift

    B, T, H = shape
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    wide = array(B, T, H, 64, dtype=dtype)
    flat, of_model = array(B, T, H * 64, dtype=dtype), array(H * 64)
    shared = array(B, T, 1, 128, dtype=dtype)
    function = lambda *inputs: getattr(kernels, op)(*inputs, impl=impl)
    if op == "wkv6":
        inputs = [wide, wide, wide, array(B, T, H, 64), array(H, 64)]
    elif op == "ssd":
        inputs = [wide, array(B, T, H), array(H), shared, shared]
    elif op == "head_norm":
        inputs = [wide, flat, of_model, of_model]
        function = lambda *inputs: head_norm.gated(*inputs, 64e-5)
    else:
        inputs = [flat, array(5, H * 64)]
        inputs += [array(B, T, 5 * 32, dtype=dtype), array(5, 32, H * 64)]
        function = lambda x, *shares: token_shift.blends(x, None, None, *shares)
    return calls_of(function, inputs, capability, gradient=gradient)


def calls_of(function, inputs, capability, *, gradient=True):
    """Serialised kernels of a function and its gradient in the order they run."""
    import jax
    from jaxlib.mlir import ir

    from gt_jax.kernels.pallas import devices
    from gt_jax.kernels.pallas.architectures import lowered_for

    def gradients(*inputs):
        outputs, pull_back = jax.vjp(function, *inputs)
        return outputs, pull_back(outputs)

    jax.clear_caches()
    with devices.simulated("lower"), lowered_for(capability):
        traced = jax.jit(gradients if gradient else function).trace(*inputs)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found, calls = {}, []

    def visit(operation):
        if operation.name == "func.func":
            name = ir.StringAttr(operation.attributes["sym_name"]).value
            found[name] = operation
        return ir.WalkResult.ADVANCE

    def follow(operation):
        """Kernels in the order of their calls; a function may be called more than once."""
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            if "mosaic_gpu" in target:
                backend = operation.attributes["mhlo.backend_config"]
                calls.append(backend["module"].value_bytes)
        if operation.name == "func.call":
            callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
            found[callee].walk(follow)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    found["main"].walk(follow)
    return calls


def compiled(compiler, module):
    """What the assembler says of one kernel."""
    with tempfile.TemporaryFile() as log:  # it and the stub write to the file descriptors
        kept = os.dup(1), os.dup(2)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        done = compiler(module, len(module))
        for descriptor, copy in zip((1, 2), kept):
            os.dup2(copy, descriptor)
            os.close(copy)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if done is None:
        return {"error": "\n".join(text.splitlines()[-5:])}
    number = lambda pattern: int((re.findall(pattern, text) or [-1])[-1])
    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "shared": max(0, number(r"(\d+) bytes of shared memory")),  # not said where none is used
    }


def faults_of(row):
    who = f"{row['kernel']} for compute capability {row['gpu']}"
    if "error" in row:
        yield f"{who} does not compile:\n{row['error']}"
        return
    most = MOST_SPILLED.get(row["kernel"], 0)
    if not 0 <= row["spilled"] <= most:
        yield f"{who} spills {row['spilled']} bytes; MOST_SPILLED allows {most}"
    allowed = SHARED_MEMORY[row["gpu"]] * 1024 - 16  # for what is not dynamic
    if not 0 <= row["shared"] <= allowed:
        yield f"{who} takes {row['shared']} bytes of shared memory of {allowed}"


if __name__ == "__main__":
    sys.exit(main())
