"""How long the scans of minGRU and ParallelScan take, beside what moving their bytes takes.

    python -m experiments scans --seeds=4

8 rows of 2048 tokens, of the channels that the fusions of configs/gf_mh.py have. A time is a device
time of a kernel, from a profiler's trace: the median of all calls and the ends of their range. Of
SETS inputs, each is called --seeds times, in turn, so that none lies in a cache. The floor is each
input read once and each output written once at the bandwidth of a large copy in the same run.
Needs a GPU that has the kernels.
"""

import collections

import jax
import jax.numpy as jnp

from experiments.lab import command, results, traces
from experiments.lab.timing import copy_bandwidth, spread, total_bytes
from gt_jax.errors import InputError
from gt_jax.kernels.elementwise import gated_scan, memory_scan
from gt_jax.kernels.pallas.devices import portable_unsupported

SHAPE, QUICK = (8, 2048), (1, 64)
CHANNELS = {"minGRU": 192, "ParallelScan": 128}
KERNELS = {"minGRU": "gated_scan", "ParallelScan": "memory_scan"}
SETS = 8  # of inputs, more than a second-level cache holds
PASSES = ("forward", "backward")
COLUMNS = ["scan", "channels", *(f"{name}{of}" for name in PASSES for of in (", us", ", floor"))]


def main(argv=None):
    parser = command.parser("scans", __doc__)
    parser.set_defaults(seeds=4)
    options = command.parse(parser, argv)
    if reason := portable_unsupported():
        raise InputError(f"scans times kernels on a GPU: {reason}")
    shape = QUICK if options.quick else SHAPE
    effort = {"seconds": 0.0 if options.quick else 0.2, "least_calls": 2, "repeats": 2}
    bandwidth = copy_bandwidth(effort)
    rows, measures = [], {}
    for name, channels in CHANNELS.items():
        sets = [inputs(name, *shape, channels, jax.random.key(n)) for n in range(SETS)]
        found = times(name, sets, len(options.seeds))
        row = [name, channels]
        for direction in PASSES:
            us = measures[f"us {name}, {direction}"] = spread(found[direction])
            row += [us, 1e6 * moved(name, direction, *sets[0]) / bandwidth]
        rows.append(row)
    results.write(
        options,
        settings={"batch": shape[0], "length": shape[1], "copy_bytes_per_second": bandwidth},
        measures=measures,
        tables=[results.table("Scans of arbiters", COLUMNS, rows, "Device time of a call.")],
    )


def inputs(name, B, T, C, key):
    """(arguments, cotangents) of a scan: of normal gates, every other channel of which lasts."""
    keys = iter(jax.random.split(key, 6))
    draw = lambda *shape, dtype=jnp.bfloat16: jax.random.normal(next(keys), shape).astype(dtype)
    gates, of_channels = draw(B, T, 2 * C), draw(C, dtype=jnp.float32)
    state = draw(B, C, dtype=jnp.float32)
    d_last = draw(B, C, dtype=jnp.float32)
    if name == "minGRU":  # update is the second half; where it is low, the state stays
        lasts = gates[..., C + 1 :: 2]
        gates = gates.at[..., C + 1 :: 2].set(-6 - lasts**2)
        return (gates, of_channels, state), (draw(B, T, dtype=jnp.float32), d_last)
    lasts = gates[..., 1:C:2]  # forget is the first
    gates = gates.at[..., 1:C:2].set(6 + lasts**2)
    return (gates, draw(B, T, C), of_channels, state), (draw(B, T, C), d_last)


def run_once(name, arguments, cotangents):
    """Results and gradients of one call."""
    scan = {"minGRU": gated_scan.scan, "ParallelScan": memory_scan.scan}[name]
    outputs, pull_back = jax.vjp(lambda *z: scan(*z, None), *arguments)
    return outputs, pull_back(cotangents)


def times(name, sets, turns):
    """Of PASSES, us of each call."""
    call = jax.jit(lambda sets: [run_once(name, *each) for each in sets])
    jax.block_until_ready(call(sets))
    events = traces.kernels(lambda: jax.block_until_ready([call(sets) for _ in range(turns)]))
    found = collections.defaultdict(list)
    for kernel, begin, end in (event for device in events for event in device):
        for direction in PASSES:
            if f"{KERNELS[name]}_{direction}" in kernel:
                found[direction].append((end - begin) / 1e3)
    return found


def moved(name, direction, arguments, cotangents):
    """Bytes that a pass must read and write: s lies between the two, and has the gates' dtype."""
    gates, cotangent = arguments[0], cotangents[0]
    s = gates.nbytes // 2
    if direction == "forward":
        return total_bytes(arguments) + s
    of_tokens = [z for z in arguments if z.ndim == 3]  # and their gradients
    return total_bytes(arguments) + total_bytes(of_tokens) + s + cotangent.nbytes


if __name__ == "__main__":
    command.run(main)
