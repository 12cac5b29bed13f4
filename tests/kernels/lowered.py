"""What the kernel variants of the tests lower to, to compare two checkouts.

    python -m tests.kernels.lowered record OUT [--only REGEX]    # in each checkout
    python -m tests.kernels.lowered compare BEFORE AFTER

`record` lowers each variant on a CPU and writes programs/VARIANT.mlir (the StableHLO around the
kernels), kernels/HASH.mlir.gz (the Mosaic module of a kernel) and variants.json with the hashes.
What is not compared, because it changes no machine code: source locations, names of functions and
kernels, the kernel_hash and dump_basename that Pallas derives from them, and what the compiler's
first passes change, canonicalisation and common subexpressions. The StableHLO is compared as a
graph of operations: which function an operation stands in and in which order a function takes its
arguments does not count. Of kernels the order of memory accesses, barriers and loops counts, and
not that of the arithmetic between them.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import json
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir, passmanager
from jax.experimental.mosaic.gpu import dialect
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gt_jax.kernels.cases import LENGTHS, segments
from gt_jax.kernels.pallas.architectures import OLDEST, lowered_for
from gt_jax.kernels.pallas.devices import simulated
from tests.kernels import elementwise_variants
from tests.kernels.hopper_kernels import SSD, WKV6

# The GPU that each implementation is lowered for: that of Hopper is Pallas' own choice.
ARCHITECTURES = {
    "mosaic": contextlib.nullcontext,
    "portable": functools.partial(lowered_for, OLDEST),
}

# Shapes of the tests of each kernel; what is left out has the default of `Kernel.make`.
WKV6_SHAPES = [
    *({"length": T, "heads": H, "K": K, "V": K} for T in (130, 2048) for H in (1, 2, 4)
      for K in (32, 64)),
    {"length": 130, "heads": 3},
    {"length": 64, "heads": 1},
    {"length": 200, "heads": 1},
    {"length": 65, "heads": 2, "K": 32, "V": 32},
    {"length": 65},
    {"length": 5, "V": 32},
    *({"batch": 2, "length": 150, "heads": 32, "K": K, "V": K} for K in (32, 64)),
    {"batch": 1, "length": 4096, "heads": 16},
    {"batch": 1, "length": 5000, "heads": 2},
    {"batch": 2, "length": 2048, "heads": 12},
    {"length": 16384, "heads": 4},
]  # fmt: skip
SSD_SHAPES = [
    *({"batch": 2, "length": T, "heads": H, "groups": G, "N": N} for T in (64, 130, 2048)
      for H, G in ((4, 2), (3, 1)) for N in (64, 128)),
    {"length": 64, "heads": 3, "groups": 3},
    {"length": 130, "heads": 3},
    {"length": 130, "N": 128},
    {"length": 200, "heads": 1},
    {"length": 65, "heads": 4, "groups": 2},
    {"length": 150, "heads": 8},
    {"length": 1280},
    *({"batch": 2, "length": 150, "heads": 32, "groups": 2, "N": N} for N in (64, 128)),
    {"batch": 1, "length": 4096, "heads": 16, "N": 128},
    {"batch": 1, "length": 5000, "heads": 2, "N": 128},
    {"batch": 2, "length": 2048, "heads": 24, "N": 128},
    *({"heads": H, "groups": G} for H, G in ((24, 1), (24, 24), (33, 11), (132, 2), (260, 1))),
]  # fmt: skip
SHARED_SHAPES = [
    *({"batch": 2, "length": T, "heads": 32} for T in LENGTHS),
    {"batch": 2, "length": 300, "heads": 8},
    {"batch": 4, "length": 900, "heads": 64},
    {"batch": 65540, "length": 8, "heads": 2},
    *({"heads": H} for H in (1, 3, 132, 257)),
]

# Names of operations without effects
_ARITHMETIC = r"(arith|math|builtin)\.|vector\.(?!load|store)|memref\.(cast|extract)"
_ARITHMETIC += r"|gpu\.(thread_id|block)|llvm\.(getelementptr|addrspacecast)"


def variants():
    """Pairs of a name and a function that lowers the variant."""
    for kernel, own in ((WKV6, WKV6_SHAPES), (SSD, SSD_SHAPES)):
        for impl, dtypes in kernel.dtypes.items():
            for dtype in dtypes:
                start = f"{kernel.name}-{impl}-{dtype}"
                architecture = ARCHITECTURES[impl]
                for name, function, inputs, x64 in _variants(kernel, impl, dtype, own):
                    yield f"{start}-{name}", _lower(function, inputs, architecture, x64)
    for name, function, inputs in elementwise_variants.variants():
        lower = _lower(_gradients(function), inputs, ARCHITECTURES["portable"], False)
        yield f"elementwise-{name}", lower


def _variants(kernel, impl, dtype, own):
    """Names, functions, their inputs, and whether 64 bits are switched on as in the tests."""
    for shape in own + SHARED_SHAPES:
        name = "-".join(f"{key}{value}" for key, value in shape.items())
        inputs = _shapes(kernel, dtype, **shape)
        yield f"{name}-forward", kernel.run(impl), inputs, True
        yield f"{name}-gradient", _gradients(kernel.run(impl)), inputs, True
    for length in (130, 2048):
        inputs = _shapes(kernel, dtype, length=length)
        resets = jnp.asarray(segments(1, length)[:, :1] == segments(1, length))
        yield f"length{length}-segments", _gradients(kernel.run(impl, resets)), inputs, True
    inputs = _shapes(kernel, dtype, length=64)
    stacked = [jax.ShapeDtypeStruct((2, *z.shape), z.dtype) for z in inputs]
    yield "vmap-remat-scan", _layers(kernel, impl), stacked, True
    inputs = _shapes(kernel, dtype, per_token=False, batch=2, length=64)
    yield "shard_map", _shards(kernel, impl), inputs, True
    # Without an initial state, and in the 32 bit mode that users have.
    inputs = _shapes(kernel, dtype, per_token=False, length=130)[:-1]
    yield "x32", _gradients(kernel.call(impl)), inputs, False


def _shapes(kernel, dtype, *, per_token=True, **shape):
    """Shapes and dtypes of a kernel's inputs; large arrays need not exist."""
    make = lambda: kernel.make(**{"length": 130, "batch": 1} | shape, dtype=dtype)
    if shape.get("batch", 1) > 8:
        small = _shapes(kernel, dtype, per_token=per_token, **shape | {"batch": 3})
        return [jax.ShapeDtypeStruct(tuple(shape["batch"] if n == 3 and not i else n
                                           for i, n in enumerate(z.shape)), z.dtype)
                for z in small]  # fmt: skip
    inputs = kernel.per_token(make()) if per_token else make()
    return [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in inputs]


def _gradients(function):
    def gradients(*inputs):
        outputs, pull_back = jax.vjp(function, *inputs)
        return outputs, pull_back(outputs)

    return gradients


def _lower(function, inputs, architecture, x64):
    def lower():
        with simulated("lower"), architecture(), jax.enable_x64(x64):
            return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))

    return lower


def _layers(kernel, impl):
    def layers(*arrays):
        def layer(x, _):
            return jax.checkpoint(kernel.run(impl))(x, *arrays[1:])[0], None

        return jax.lax.scan(layer, arrays[0], None, length=2)[0].astype(jnp.float32).sum()

    return jax.vmap(jax.grad(layers, range(len(kernel.arguments))))


def _shards(kernel, impl):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    specs = tuple(P() if name in kernel.of_heads else P("batch") for name in kernel.arguments)
    return jax.shard_map(
        kernel.call(impl), mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=False
    )


def take_kernels(module):
    """Puts a hash in place of each kernel of a StableHLO module; returns {hash: text}."""
    texts, calls = {}, []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mhlo.backend_config" in op.attributes:
            calls.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in calls:
        config = {entry.name: entry.attr for entry in op.attributes["mhlo.backend_config"]}
        if "module" not in config:
            continue
        text = _kernel_text(config.pop("module").value_bytes)
        del config["kernel_hash"]
        rest = "".join(f"\n// {name} = {value}" for name, value in sorted(config.items()))
        digest = _digest(_kernel_digest(text), rest)
        texts[digest] = text + rest
        with module.context:
            op.attributes["mhlo.backend_config"] = ir.StringAttr.get(digest)
    return texts


def _kernel_text(bytecode):
    with mlir.make_ir_context() as context:
        dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        serialised = ir.Module.parse(bytecode).operation.get_asm()
        module = ir.Module.parse(serialised.replace('"stable_mosaic_gpu.', '"'))
        passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        name = ir.StringAttr(module.operation.attributes["sym_name"]).value
        text = module.operation.get_asm(enable_debug_info=False)
    text = re.sub(r', mosaic_gpu.dump_basename = "\w*"', "", text)
    return re.sub(rf"\b{name}(_mosaic_gpu)?\b", r"kernel\1", text)


def _kernel_digest(text):
    """A hash of the operations with effects, in their order, and of the arithmetic they use."""

    def block(operations, known):
        effects = []
        for op in (z.operation for z in operations):
            attributes = sorted((name, str(op.attributes[name])) for name in op.attributes)
            regions = []
            for inner in (z for region in op.regions for z in region.blocks):
                known |= {z: _digest("argument", effects, n, len(regions))
                          for n, z in enumerate(inner.arguments)}  # fmt: skip
                regions.append(block(inner.operations, known))
            types, operands = [str(z.type) for z in op.results], [known[z] for z in op.operands]
            digest = _digest(op.name, attributes, operands, regions, types)
            if not re.match(_ARITHMETIC, op.name):
                effects.append(digest)
                digest = _digest(digest, len(effects))
            known |= {z: _digest(digest, n) for n, z in enumerate(op.results)}
        return _digest(effects)

    with mlir.make_ir_context() as context:
        dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        return block(ir.Module.parse(text).body.operations, {})


def program_digest(text):
    """A hash of what the text of a StableHLO module computes, as a graph of operations."""
    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        return _graph_digest(ir.Module.parse(text))


def _graph_digest(module):
    functions = {ir.StringAttr(f.attributes["sym_name"]).value: f for f in module.body.operations}

    def block(block, arguments, outer, depth):
        known = dict(outer) | dict(zip(block.arguments, arguments))
        for op in block.operations:
            operands = [known[z] for z in op.operands]
            if op.name in ("func.return", "stablehlo.return", "sdy.return"):
                return operands
            if op.name == "func.call":
                callee = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
                results = block_of(functions[callee], operands, depth)
            else:
                results = operation(op, operands, known, depth + 1)
            known |= dict(zip(op.results, results, strict=True))
        raise ValueError("a block without return")

    def block_of(function, arguments, depth=0):
        return block(function.regions[0].blocks[0], arguments, {}, depth)

    def operation(op, operands, known, depth):
        attributes = sorted((name, str(op.attributes[name])) for name in op.attributes)
        regions = []
        for region in op.regions:
            for inner in region.blocks:
                names = [_digest("argument", depth, n) for n in range(len(inner.arguments))]
                regions.append(block(inner, names, known, depth))
        types = [str(z.type) for z in op.results]
        return [
            _digest(op.name, attributes, operands, regions, types, n) for n in range(len(types))
        ]

    main = functions["main"]
    arguments = main.regions[0].blocks[0].arguments
    names = [_digest(n, str(z.type)) for n, z in enumerate(arguments)]
    return _digest(block_of(main, names))


def _digest(*contents):
    return hashlib.sha256("\n".join(map(str, contents)).encode()).hexdigest()[:24]


def record(out, only):
    """Lowers the variants whose names hold `only`; adds them to the folder `out`."""
    for folder in ("programs", "kernels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    index = out / "variants.json"
    found = json.loads(index.read_text()) if index.exists() else {}
    for name, lower in variants():
        if not re.search(only, name):
            continue
        start = time.time()
        module = lower().compiler_ir("stablehlo")
        kernels = take_kernels(module)
        for digest, text in kernels.items():
            path = out / "kernels" / f"{digest}.mlir.gz"
            if not path.exists():
                path.write_bytes(gzip.compress(text.encode(), 1, mtime=0))
        program = module.operation.get_asm(enable_debug_info=False)
        (out / "programs" / f"{name}.mlir").write_text(program)
        found[name] = {"program": program_digest(program), "kernels": sorted(kernels)}
        index.write_text(json.dumps(found, indent=1))
        print(f"{name}: {len(kernels)} kernels, {time.time() - start:.1f} s", flush=True)


def compare(before, after):
    """Prints how two recorded folders differ; returns the number of variants that do."""
    old, new = (json.loads((folder / "variants.json").read_text()) for folder in (before, after))
    for folder, names in ((after, old.keys() - new.keys()), (before, new.keys() - old.keys())):
        if names:
            print(f"{len(names)} variants are missing from {folder}, e.g. {min(names)}")
    shared = sorted(old.keys() & new.keys())
    differ = [name for name in shared if old[name] != new[name]]
    for name in differ:
        kernels = [sorted({*z[name]["kernels"]}) for z in (old, new)]
        gone, come = ({*kernels[0]} - {*kernels[1]}), ({*kernels[1]} - {*kernels[0]})
        what = f"kernels {sorted(gone)} became {sorted(come)}" if gone or come else "StableHLO"
        print(f"{name}: {what}")
    kernels = {digest for name in shared for digest in new[name]["kernels"]}
    print(f"{len(shared)} variants with {len(kernels)} kernels compared, {len(differ)} differ")
    return len(differ)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("out", type=Path)
    recorder.add_argument("--only", default="", help="regular expression for names of variants")
    comparer = commands.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.out, options.only)
    else:
        sys.exit(bool(compare(options.before, options.after)))


if __name__ == "__main__":
    main()
