"""Calls of what joins branches, scans sequences and takes losses, as lowered.py compares them."""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import (
    gated_branches,
    gated_scan,
    gelu_product,
    linear_scan,
    memory_scan,
    normed_pair,
    residual_norm,
    softmax_loss,
    weighted_norms,
)

# Tokens and widths: rows of threads walk beyond the end, or not; a token has several sections.
BRANCHES = (((2, 5), 64), ((8, 2048), 128), ((8, 2048), 768), ((8, 2048), 1536))
# Rows of 1, 2 and 32 threads; padded channels; splits of a sequence.
SCANS = ((8, 2048, 3), (8, 2048, 192), (2048, 64, 384), (1, 65536, 192), (2, 130, 64))


def variants():
    """Names, functions and their inputs."""
    for tokens, width in BRANCHES:
        for name, function, inputs in _of_branches(tokens, width):
            yield f"{name}-{'x'.join(map(str, tokens))}-{width}", function, inputs
            if width == 64:
                models = [jax.ShapeDtypeStruct((2, *z.shape), z.dtype) for z in inputs]
                yield f"{name}-vmap", jax.vmap(function), models
    for B, T, C in SCANS:
        for name, function, inputs in _of_sequences(B, T, C):
            yield f"{name}-{B}x{T}x{C}", function, inputs
    inputs = [_array(2, 2048, 1024, dtype=jnp.bfloat16), _array(1024, 64, dtype=jnp.bfloat16)]
    yield "gelu_product", gelu_product.gelu_product, inputs
    for vocabulary in (512, 16384):
        inputs = [_array(64, vocabulary), _array(64, dtype=jnp.int32)]
        yield f"softmax_loss-{vocabulary}", softmax_loss.nats_and_gradients, inputs


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _of_branches(tokens, width):
    branch, scores = (_array(*tokens, n * width, dtype=jnp.bfloat16) for n in (1, 2))
    stream, score = _array(*tokens, width), _array(*tokens, 1)
    vector, one, two = _array(width), _array(1), _array(2)
    pair = branch, branch
    yield "normed", functools.partial(residual_norm.normed, 1e-6, 2), [stream, vector]
    added = functools.partial(residual_norm.added, 1e-6, 2)
    yield "added", added, [stream, branch, vector]
    yield "added-float32", added, [stream, stream, vector]
    of_gate = _array(2 * width), one, vector
    yield "gated", functools.partial(residual_norm.gated, 1e-6), [stream, *pair, *of_gate]
    blended = functools.partial(residual_norm.blended, 1e-6)
    yield "blended", blended, [stream, *pair, score, two, vector]
    gated_sum = lambda a, b, z, p, q, s, t: gated_branches.gated_sum(1e-2, a, b, z, (p, q), (s, t))
    yield "gated_sum", gated_sum, [*pair, scores, *[vector] * 4]
    gated_blend = lambda a, b, z, s, t, *h: gated_branches.gated_blend(1e-2, a, b, z, (s, t), *h)
    yield "gated_blend", gated_blend, [*pair, scores, *[vector] * 3, two]
    normed = lambda a, b, s, t: normed_pair.normed_pair(1e-2, a, b, (s, t))
    yield "normed_pair", normed, [*pair, vector, vector]
    weighted = lambda a, b, n, s, t, *h: weighted_norms.weighted_norms(1e-2, a, b, n, (s, t), *h)
    yield "weighted_norms", weighted, [*pair, branch, *[vector] * 3, two]


def _of_sequences(B, T, C):
    channels, state = _array(C), _array(B, C)
    yield "linear_scan", linear_scan.scan, [_array(B, T, C), _array(B, T, C), state]
    if C % 4:
        return
    starts = jnp.zeros((B, T), jnp.int32)
    kinds = {"": (jnp.bfloat16, None), "-documents": (jnp.bfloat16, starts)}
    kinds |= {"-float32": (jnp.float32, None)} if B == 2 else {}
    for kind, (dtype, resets) in kinds.items():
        of_gates, c = _array(B, T, 2 * C, dtype=dtype), _array(B, T, C, dtype=dtype)
        scan = functools.partial(gated_scan.scan, resets=resets)
        yield f"gated_scan{kind}", scan, [of_gates, channels, state]
        scan = functools.partial(memory_scan.scan, resets=resets)
        yield f"memory_scan{kind}", scan, [of_gates, c, channels, state]
