"""How fast the recurrences are, beside what moving their bytes takes and beside other libraries.

    python -m experiments kernels [--peers] [--sweep]
    python -m experiments kernels --shapes wkv6:1,256,2 ssd:1,256,4 --quick

A time is a device time: many calls between two synchronisations, the median of several such
stretches ± half their range. Inputs rotate over more bytes than a cache holds. The floor is each
input read once and each output written once at the bandwidth of a large copy in the same run:
forward, backward (inputs and the output's gradient in, gradients out) and both. "extra" is what
forward and backward in one program take beyond inputs, output and gradients; "kept" what lies there
between the two. "error" is the worst relative RMS error of the output and of every gradient per
token and head, for one head of one batch row, against float64.

Of sequences too long for that, "halves" is the error against two calls of half the tokens each,
of which the second starts from the state after the first: of output, final state and gradients.

--sweep times lengths from 4K to 64K instead, unchecked, and the line nearest to the times.
--dtype=float32 times what is multiplied in float32. --peers adds jax-linear-attention and, in a
process of their own (peers_torch.py), flash-linear-attention and mamba_ssm, on inputs of the same
distributions. What cannot run here is listed with the reason. Every number goes to --out, a plot of
time against length beside it. Rows of other shapes that --out has stay there; where they are of
another device or JAX, they say so.
"""

import argparse
import contextlib
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernel_errors import (
    OLDEST_PORTABLE,
    errors,
    errors_of_halves,
    exact,
    one_head,
    run_ours,
)
from experiments.benchmarks.kernel_tables import PASSES, draw, print_group, print_linearity
from experiments.benchmarks.peers_jax import JAX_PEERS
from experiments.lab import command, results
from experiments.lab.recurrences import OPS, STATE_SIZE, make_inputs
from experiments.lab.timing import copy_bandwidth, timings, total_bytes
from gt_jax.kernels.pallas.architectures import OLDEST, lowered_for

# B,T,H or B,T,H,K and B,T,H,N
PUBLISHED = ("8,1024,8", "2,16384,4")  # times of flash-linear-attention's and of GLA's kernels
LONG = "1,1048576,4"
SHAPES = {
    "wkv6": ["8,4096,32", "1,4096,32", "1,32768,32", "32,1024,32", "8,2048,12", *PUBLISHED, LONG],
    "ssd": ["8,4096,64", "1,4096,64", "1,32768,64", "8,2048,24", "8,4096,64,64", LONG],
}
SWEEP = {
    "wkv6": [f"8,{1024 * k},32" for k in (4, 8, 16, 32, 64)],
    "ssd": [f"8,{1024 * k},64" for k in (4, 8, 16, 32, 64)],
}
ROTATED_BYTES = 2**28  # five times the second-level cache of an H100
TOLERANCE = {"bfloat16": 4e-3, "float32": 1e-5}  # as in the tests
LONGEST_CHECKED = 32768  # the float64 gradient keeps the state of every token


def main(argv=None):
    parser = command.plain_parser("kernels", __doc__)
    parser.add_argument(
        "--ops", nargs="+", choices=OPS, default=list(OPS), help="recurrences to time"
    )
    parser.add_argument(
        "--impls",
        nargs="+",
        default=["chunked", "mosaic"],
        help=f"{OLDEST_PORTABLE} is portable as lowered for the oldest GPU that it runs on",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_text,
        metavar="[OP:]B,T,H[,K|N]",
        help="sizes to time instead of the usual ones",
    )
    parser.add_argument("--sweep", action="store_true", help="lengths from 4K to 64K")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of the inputs")
    parser.add_argument("--peers", action="store_true", help="other libraries too")
    parser.add_argument("--quick", action="store_true", help="a few calls, to try it out")
    command.add_out(parser, "kernels")
    options = parser.parse_args(argv)
    options.out = results.path_of(options)
    command.check_can_be_written(options.out)  # else it would be found out once all has run
    if options.peers and options.dtype != "bfloat16":
        parser.error(f"--dtype={options.dtype}: the libraries of --peers are timed in bfloat16")
    effort = {"seconds": 0.2, "least_calls": 20, "repeats": 5}
    if options.quick:
        effort = {"seconds": 0.0, "least_calls": 2, "repeats": 2}
    lists = SWEEP if options.sweep else SHAPES
    cases = [
        (op, parse_shape(op, shape.removeprefix(f"{op}:")))
        for op in options.ops
        for shape in options.shapes or lists[op]
        if ":" not in shape or shape.startswith(f"{op}:")
    ]
    if not cases:
        parser.error(f"--shapes has none of --ops {' '.join(options.ops)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        # First, while this process holds nothing of the GPU.
        torch_rows = run_torch(cases, folder) if options.peers else {}
        bandwidth = copy_bandwidth(effort)
        device = jax.devices()[0].device_kind
        print(f"{device}, jax {jax.__version__}, copy {bandwidth / 1e9:,.0f} GB/s")
        rows = []
        found = {"device": device, "jax": jax.__version__, "dtype": options.dtype}
        found["copy_bytes_per_second"] = bandwidth
        kept = rows_of_others(options.out, cases, found)
        for op, shape in cases:
            group = benchmark(
                op,
                shape,
                contenders(op, options),
                bandwidth,
                effort,
                options.dtype,
                check=not options.sweep,
            )
            if (op, shape) in torch_rows:
                group.append(checked(op, torch_rows[op, shape]))
            print_group(op, shape, group)
            rows += [{"op": op, "shape": shape} | row for row in group]
            options.out.write_text(json.dumps(found | {"rows": kept + rows}, indent=1) + "\n")
    if options.sweep:
        print_linearity(rows)
    draw(rows, device, options.out.with_suffix(".png"))
    ours = [row for row in rows if row["who"] in options.impls]
    most = TOLERANCE[options.dtype]
    worst = lambda row: max([0.0, *row.get("errors", {}).values(), *row.get("halves", {}).values()])
    wrong = [row for row in ours if not worst(row) <= most]
    if wrong:
        sys.exit(f"error: beyond {most}: " + ", ".join(f"{r['op']} {r['who']}" for r in wrong))


def rows_of_others(path, cases, found):
    """Rows that a file has for other shapes or types, each with what else is not as `found`."""
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    rows = [(old | row) for row in old.pop("rows")]
    new = [(op, list(shape), found["dtype"]) for op, shape in cases]
    rows = [row for row in rows if (row["op"], row["shape"], row["dtype"]) not in new]
    same = lambda row, name: name in row and row[name] == found[name]
    return [{k: z for k, z in row.items() if k not in found or not same(row, k)} for row in rows]


def shape_text(text):
    """text, if it is a shape of an operation or of all."""
    op, _, numbers = text.rpartition(":")
    if op not in ("", *OPS) or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2,3}", numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write 8,4096,32 or, for one operation, wkv6:8,4096,32,64"
        )
    return text


def parse_shape(op, text):
    """(B, T, H, K or N) of "B,T,H" or "B,T,H,size"."""
    shape = tuple(map(int, text.split(",")))
    return shape if len(shape) == 4 else (*shape, STATE_SIZE[op])


def contenders(op, options):
    """name -> (function of the inputs by name that gives the output, is it the same function)."""
    ours = {impl: (functools.partial(run_ours, op, impl), True) for impl in options.impls}
    return ours | JAX_PEERS[op] if options.peers else ours


def benchmark(op, shape, functions, bandwidth, effort, dtype="bfloat16", *, check=True):
    """Rows of one shape: the floor and every contender, with its numbers or why it has none."""
    make = lambda key: make_inputs(op, shape, key, dtype)
    inputs, do = jax.eval_shape(make, jax.random.key(0))
    read, written = total_bytes(inputs), total_bytes(do)
    moved = {"forward": read + written, "backward": 2 * read + written}
    moved["both"] = sum(moved.values())
    rows = [{"who": "floor"} | {part: {"ms": 1e3 * moved[part] / bandwidth} for part in PASSES}]

    keys = jax.random.split(jax.random.key(0), min(8, -(-ROTATED_BYTES // read)))
    sets = [make(key) for key in keys]
    short = shape[1] <= LONGEST_CHECKED
    known = exact(op, one_head(*sets[0], shape)) if check and short else {}
    for who, (function, same) in functions.items():
        try:
            with oldest() if who == OLDEST_PORTABLE else contextlib.nullcontext():
                row, arrays = measure(function, sets, effort)
                if same and check and not short:
                    row["halves"] = errors_of_halves(op, who, sets[0][0])
            if same and known:
                row["errors"] = errors(one_head(*arrays, shape), known)
        except Exception as reason:  # of a library that is not ours, it can be any
            row = {"reason": f"{type(reason).__name__}: {reason}".split("\n")[0]}
        rows.append({"who": who} | row)
    return rows


@contextlib.contextmanager
def oldest():
    """Within, kernels are lowered for the oldest GPU; caches do not tell architectures apart."""
    jax.clear_caches()
    with lowered_for(OLDEST):
        yield
    jax.clear_caches()


def measure(function, sets, effort):
    """Times, memory and compilation of a contender; its gradients by name and its output."""

    def forward(inputs):
        return function(**inputs)

    def both(inputs, do):
        o, pull_back = jax.vjp(forward, inputs)
        return o, *pull_back(do)

    began = time.perf_counter()
    both = jax.jit(both).lower(*sets[0]).compile()
    compiled = time.perf_counter() - began
    row = {"compile_seconds": compiled, "extra_bytes": both.memory_analysis().temp_size_in_bytes}
    row["forward"] = clock(jax.jit(forward), [(inputs,) for inputs, _ in sets], effort)
    row["both"] = clock(both, sets, effort)

    save = jax.jit(lambda inputs: jax.vjp(forward, inputs)[1])
    saved = [(save(inputs), do) for inputs, do in sets]
    row["backward"] = clock(jax.jit(lambda pull_back, do: pull_back(do)), saved, effort)
    given = jax.tree.leaves(sets[0][0])
    row["kept_bytes"] = total_bytes(
        [z for z in jax.tree.leaves(saved[0][0]) if not any(equal(z, x) for x in given)]
    )
    del saved
    o, gradients = both(*sets[0])
    return row, (gradients, o)


def clock(function, sets, effort):
    """Median ms of a call of function(*set) and half the range over stretches of many calls."""
    times = timings(function, sets, effort)
    return {"ms": statistics.median(times), "spread": (max(times) - min(times)) / 2}


def equal(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b))


def run_torch(cases, folder):
    """(op, shape) -> row of the PyTorch library for it, or why there is none."""
    names = [f"{op}:{','.join(map(str, shape))}" for op, shape in cases]
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.peers_torch",
        *names,
        f"--samples={folder}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    reason = (done.stderr.strip() or "it ended early").splitlines()[-1]
    rows += [{"who": "PyTorch", "reason": reason}] * (len(cases) - len(rows))
    return dict(zip(cases, rows))


def checked(op, row):
    """A row of the PyTorch process with its errors in the place of its sample."""
    if "sample" not in row:
        return row
    sample = dict(np.load(row.pop("sample")))
    read = {name.removeprefix("in_"): z for name, z in sample.items() if name.startswith("in_")}
    return row | {"errors": errors(sample, exact(op, read))}


if __name__ == "__main__":
    command.run(main)
