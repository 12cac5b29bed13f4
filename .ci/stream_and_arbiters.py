"""The kernels of the residual stream and of arbiters, as cross_compile.py compiles them."""

import functools


def kernels(calls_of, capability):
    """(name, serialised kernel) of all of them.

    Args:
        calls_of: function of (function, inputs, capability) -> serialised kernels in the order they
            run.
        capability: of the GPU, (major, minor).
    """
    for some in (residual_norm_kernels, gated_branches_kernels, linear_scan_kernels):
        yield from some(calls_of, capability)


def residual_norm_kernels(calls_of, capability):
    """(name, serialised kernel) of the residual stream's norms."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import residual_norm

    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    for width in (128, 768, 2048):
        branch = array(16, 2048, width, dtype=jnp.bfloat16)
        gate = branch, branch, array(2 * width), array(1)
        score = branch, branch, array(16, 2048, 1), array(2)
        kinds = {"normed": (), "added": (branch,), "gated": gate, "blended": score}
        for kind, inputs in kinds.items():
            options = (1e-6, 2) if kind == "normed" else (1e-6,)
            call = functools.partial(getattr(residual_norm, kind), *options)
            modules = calls_of(call, [array(*branch.shape), *inputs, array(width)], capability)
            for direction, module in zip(("forward", "backward"), modules, strict=True):
                yield f"Residual norm, {kind}, {direction}, {width} channels", module


def gated_branches_kernels(calls_of, capability):
    """(name, serialised kernel) of what arbiters do to normalised branches."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import gated_branches, normed_pair, weighted_norms

    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    for width in (128, 768, 1536):
        branch, scores = (array(8, 2048, n * width, dtype=jnp.bfloat16) for n in (1, 2))
        vector, pair = array(width), (array(width),) * 2
        kinds = {
            "gated_sum": (gated_branches.gated_sum, [scores, pair, pair]),
            "gated_blend": (gated_branches.gated_blend, [scores, pair, vector, array(2)]),
            "normed_pair": (normed_pair.normed_pair, [pair]),
            "weighted_norms": (weighted_norms.weighted_norms, [branch, pair, vector, array(2)]),
        }
        for kind, (function, inputs) in kinds.items():
            call = functools.partial(function, 1e-2)
            modules = calls_of(call, [branch, branch, *inputs], capability)
            for direction, module in zip(("forward", "backward"), modules, strict=True):
                yield f"Branches, {kind}, {direction}, {width} channels", module


def linear_scan_kernels(calls_of, capability):
    """(name, serialised kernel) of the scans of arbiters."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import gated_scan, linear_scan, memory_scan

    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    passes = ("forward", "backward")
    splits = ("splits, forward", "forward of a split", "splits, backward", "backward of a split")

    def named(kind, function, inputs, B, T, C):
        calls = calls_of(function, inputs, capability)
        names = splits if B == 1 else passes
        return zip((f"{kind}, {z}, {B} x {T} x {C}" for z in names), calls, strict=True)

    # Rows of 1, 2 and 32 threads
    for B, T, C in ((8, 2048, 3), (8, 2048, 192), (2048, 64, 384), (1, 65536, 192)):
        inputs = [array(B, T, C), array(B, T, C), array(B, C)]
        yield from named("Linear scan", linear_scan.scan, inputs, B, T, C)
    for B, T, C in ((8, 2048, 192), (2048, 64, 384), (1, 65536, 192)):
        inputs = [array(B, T, 2 * C, dtype=jnp.bfloat16), array(C), array(B, C)]
        resets = jnp.zeros((B, T), jnp.int32) if T == 2048 else None
        scan = functools.partial(gated_scan.scan, resets=resets)
        yield from named("Gated scan", scan, inputs, B, T, C)
        scores, c, *of_state = inputs[0], array(B, T, C, dtype=jnp.bfloat16), *inputs[1:]
        scan = functools.partial(memory_scan.scan, resets=resets)
        yield from named("Memory scan", scan, [scores, c, *of_state], B, T, C)
