"""Both recurrences over devices against their float64 definition; prints errors as JSON.

Run by test_context_parallel.py in a process of its own, as devices are counted when JAX starts.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gt_jax.kernels import cases, ssd, wkv6
from gt_jax.kernels.pallas import devices, splits
from tests.kernels.accuracy import errors

DEVICES, LENGTH = 4, 4 * 24
WKV6_NAMES = ("r", "k", "v", "w", "u", "initial_state")
SSD_NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
tokens, copied = P(None, "sequence"), P()


def over_devices(function, in_specs, segment_ids, count=DEVICES, out_specs=(tokens, copied)):
    """function(*arrays, segment_ids) with tokens spread over the devices."""
    mesh = jax.make_mesh((count,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    ids_spec = copied if segment_ids is None else tokens
    spread = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*in_specs, ids_spec),
        out_specs=out_specs,
        check_vma=False,
    )
    return lambda *arrays: spread(*arrays, segment_ids)


def recurrence(op, segmented, impl, axis_name):
    """wkv6 or ssd over its arrays and segment ids, the latter used or not."""

    def run(*arrays):
        *arrays, state, ids = arrays
        options = {"D": arrays.pop()} if op is ssd else {}
        options["segment_ids"] = ids if segmented else None
        return op(*arrays, **options, impl=impl, initial_state=state, axis_name=axis_name)

    return run


def recurrence_errors(op, ids):
    """Case -> errors. What regimes or dtypes share is compiled once for them."""
    if op is wkv6:
        make = lambda regime: cases.wkv6_inputs(regime, 3, LENGTH, 2, 8, 4)
        names, narrow = WKV6_NAMES, "rkv"
        specs = (tokens,) * 4 + (copied,) * 2
        regimes = ("typical", "minus_inf", "no_decay", "hard_resets")
    else:
        make = lambda regime: cases.ssd_inputs(regime, 3, LENGTH, 4, 2, 8, 4)
        names, narrow = SSD_NAMES, "xBC"
        specs = (tokens, tokens, copied, tokens, tokens, copied, copied)
        regimes = ("typical", "near_one", "huge_step")
    found = {}

    def measure(dtype, regimes, segmented, impl, reference):
        spread = over_devices(recurrence(op, segmented, impl, "sequence"), specs, ids)
        wide = jnp.promote_types(dtype, jnp.float32)
        dtypes = [dtype if name in narrow else wide for name in names]
        for regime in regimes:
            inputs = tuple(map(jnp.asarray, make(regime), dtypes))
            case = f"{op.__name__} {dtype} {'segments' if segmented else regime}"
            found[case] = errors(spread, reference, inputs, names)

    for segmented in (False, True):
        definition = recurrence(op, segmented, "reference", None)
        reference = lambda *arrays, definition=definition: definition(*arrays, ids)
        if not segmented:
            measure("float32", regimes, False, "chunked", reference)
            continue
        measure("float32", ("typical",), True, "chunked", reference)
        measure("bfloat16", ("typical",), True, "chunked", reference)
        measure("float64", ("typical",), True, "reference", reference)
    return found


def kernel_errors(kernel, impl, count, segment_ids=None, **shape):
    """Errors of Pallas kernels on so many devices; shape as for `kernel.make`."""

    def candidate(*arrays):
        *arrays, ids = arrays
        options = {"segment_ids": ids, "axis_name": "sequence", "impl": impl}
        return kernel.operation(**dict(zip(kernel.arguments, arrays)), **options)

    def reference(*arrays):
        options = {"segment_ids": segment_ids, "impl": "reference"}
        return kernel.operation(**dict(zip(kernel.arguments, arrays)), **options)

    inputs = kernel.make(**shape)
    whole = (*kernel.of_heads, "initial_state")
    specs = [copied if name in whole else tokens for name in kernel.arguments]
    spread = over_devices(candidate, specs, segment_ids, count)
    return errors(spread, reference, inputs, kernel.arguments)


def segments_over_devices(length):
    """[2, 4 * length]: one row starts a segment on a device's border and one between; one none."""
    ids = np.cumsum(np.isin(np.arange(4 * length), (length, 2 * length + length // 3)))
    return jnp.asarray(np.stack([ids, 0 * ids]))


def portable_errors(op):
    """Of interpreted kernels: WKV6 in splits of devices and with segments, SSD without either."""
    from tests.kernels.hopper_kernels import SSD, WKV6  # an older JAX has not what these need

    with devices.simulated("interpret"):
        if op == "ssd":
            return kernel_errors(SSD, "portable", 2, length=140, heads=1)
        splits.LEAST_CHUNKS = 1
        return kernel_errors(
            WKV6, "portable", 4, segments_over_devices(100), batch=2, length=400, heads=1
        )


def main(op, impl):
    if impl == "portable":
        found = {f"{op} bfloat16 portable": portable_errors(op)}
    else:
        starts_at_borders = np.arange(LENGTH) // (LENGTH // DEVICES)
        anywhere = cases.segments(1, LENGTH, mean_length=15)[0]
        one = np.zeros(LENGTH, int)
        ids = jnp.asarray(np.stack([starts_at_borders, anywhere, one]))
        found = recurrence_errors({"wkv6": wkv6, "ssd": ssd}[op], ids)
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
