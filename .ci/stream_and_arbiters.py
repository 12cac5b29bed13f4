"""Kernels of the stream, arbiters, products and the loss, as cross_compile.py compiles them."""

import functools


def kernels(calls_of, capability):
    """(name, serialised kernel) of all of them.

    Args:
        calls_of: function of (function, inputs, capability) -> serialised kernels in the order they
            run.
        capability: of the GPU, (major, minor).
    """
    of_branches = residual_norm_kernels, gated_branches_kernels, linear_scan_kernels
    for some in (*of_branches, loss_kernels, product_kernels):
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
            options = (1e-6, 2) if kind in ("normed", "added") else (1e-6,)
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
    # Gradients, on GPUs that have clusters: of 2 and 4 blocks and none
    for B, T, C in ((8, 2048, 192), (8, 2048, 128), (2048, 64, 384), (1, 65536, 192)):
        inputs = [array(B, T, 2 * C, dtype=jnp.bfloat16), array(C), array(B, C)]
        resets = jnp.zeros((B, T), jnp.int32) if T == 2048 else None
        scan = functools.partial(gated_scan.scan, resets=resets)
        yield from named("Gated scan", scan, inputs, B, T, C)
        scores, c, *of_state = inputs[0], array(B, T, C, dtype=jnp.bfloat16), *inputs[1:]
        scan = functools.partial(memory_scan.scan, resets=resets)
        yield from named("Memory scan", scan, [scores, c, *of_state], B, T, C)


def loss_kernels(calls_of, capability):
    """(name, serialised kernel) of the cross-entropy."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import softmax_loss

    for vocabulary in (4096, 16384):
        logits = jax.ShapeDtypeStruct((4096, vocabulary), jnp.float32)
        targets = jax.ShapeDtypeStruct((4096,), jnp.int32)
        call, inputs = softmax_loss.nats_and_gradients, [logits, targets]
        (module,) = calls_of(call, inputs, capability, gradient=False)
        yield f"Softmax and loss, {vocabulary} logits", module


def product_kernels(calls_of, capability):
    """(name, serialised kernel) of what is computed again for the product behind it."""
    import jax
    import jax.numpy as jnp

    from gt_jax.kernels.elementwise import gated_norm, gelu_product, head_norm

    tokens, array = (16, 2048), jax.ShapeDtypeStruct
    narrow = lambda *shape: array(shape, jnp.bfloat16)
    vector = lambda width: array((width,), jnp.float32)
    gated = lambda y, z, scale, weights: gated_norm.gated_norm_projected(1e-5, y, z, scale, weights)
    head = lambda y, g, s, b, weights: head_norm.gated_projected(y, g, s, b, 64e-5, weights)
    y, z = narrow(*tokens, 1536), narrow(*tokens, 3352)
    of_heads = narrow(*tokens, 12, 64), narrow(*tokens, 768), vector(768), vector(768)
    kinds = {
        "GELU": (gelu_product.gelu_product, [narrow(*tokens, 3072), narrow(3072, 768)]),
        "gated norm": (gated, [y, z, vector(1536), narrow(1536, 768)]),
        "head norm": (head, [*of_heads, narrow(768, 768)]),
    }
    for kind, (function, inputs) in kinds.items():
        modules = calls_of(function, inputs, capability)
        for direction, module in zip(("forward", "backward"), modules, strict=True):
            yield f"Before a product, {kind}, {direction}", module
