"""Both recurrences over devices against their float64 definition; prints errors as JSON.

Run by test_context_parallel.py in a process of its own, as devices are counted when JAX starts.
"""

import json

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


def wkv6_errors(dtype, regime, segment_ids, impl):
    def candidate(r, k, v, w, u, state, ids, axis_name="sequence", impl=impl):
        options = {"initial_state": state, "segment_ids": ids, "axis_name": axis_name}
        return wkv6(r, k, v, w, u, impl=impl, **options)

    def reference(*arrays):
        return candidate(*arrays, segment_ids, axis_name=None, impl="reference")

    arrays = cases.wkv6_inputs(regime, 3, LENGTH, 2, 8, 4)
    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = tuple(jnp.asarray(x, dtype if i < 3 else wide) for i, x in enumerate(arrays))
    spread = over_devices(candidate, (tokens,) * 4 + (copied,) * 2, segment_ids)
    return errors(spread, reference, inputs, WKV6_NAMES)


def ssd_errors(dtype, regime, segment_ids, impl):
    def candidate(x, dt, A, B, C, D, state, ids, axis_name="sequence", impl=impl):
        options = {"initial_state": state, "segment_ids": ids, "axis_name": axis_name}
        return ssd(x, dt, A, B, C, D=D, impl=impl, **options)

    def reference(*arrays):
        return candidate(*arrays, segment_ids, axis_name=None, impl="reference")

    arrays = cases.ssd_inputs(regime, 3, LENGTH, 4, 2, 8, 4)
    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = tuple(
        jnp.asarray(x, dtype if name in "xBC" else wide) for name, x in zip(SSD_NAMES, arrays)
    )
    specs = (tokens, tokens, copied, tokens, tokens, copied, copied)
    return errors(over_devices(candidate, specs, segment_ids), reference, inputs, SSD_NAMES)


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


def portable_cases():
    """Interpreted kernels: WKV6 in splits of devices and with segments, SSD without either."""
    from tests.kernels.hopper_kernels import SSD, WKV6  # an older JAX has not what these need

    found = {}
    splits.LEAST_CHUNKS, least = 1, splits.LEAST_CHUNKS
    with devices.simulated("interpret"):
        found["wkv6 bfloat16 portable"] = kernel_errors(
            WKV6, "portable", 4, segments_over_devices(100), batch=2, length=400, heads=1
        )
        splits.LEAST_CHUNKS = least
        found["ssd bfloat16 portable"] = kernel_errors(SSD, "portable", 2, length=140, heads=1)
    return found


def main():
    found = {}
    starts_at_borders = np.arange(LENGTH) // (LENGTH // DEVICES)
    anywhere = cases.segments(1, LENGTH, mean_length=15)[0]
    one = np.zeros(LENGTH, int)
    ids = jnp.asarray(np.stack([starts_at_borders, anywhere, one]))
    for op, run, regimes in (
        ("wkv6", wkv6_errors, ("typical", "minus_inf", "no_decay", "hard_resets")),
        ("ssd", ssd_errors, ("typical", "near_one", "huge_step")),
    ):
        for regime in regimes:
            found[f"{op} float32 {regime}"] = run("float32", regime, None, "chunked")
        found[f"{op} float32 segments"] = run("float32", "typical", ids, "chunked")
        found[f"{op} bfloat16 segments"] = run("bfloat16", "typical", ids, "chunked")
        found[f"{op} float64 segments"] = run("float64", "typical", ids, "reference")
    with devices.simulated("lower"):
        too_old = devices.portable_unsupported()
    if not too_old:
        found |= portable_cases()
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
