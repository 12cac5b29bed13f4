"""The two recurrences of gt_jax: WKV6 (RWKV-6) and SSD (Mamba-2), usable without the rest.

Each is one function over a whole sequence and one for a single token:

    o, state = wkv6(r, k, v, w, u)        y, state = ssd(x, dt, A, B, C)
    o, state = wkv6_step(...)             y, state = ssd_step(...)

`impl` picks how a sequence is computed, never what: "reference" (token by token, the definition),
"chunked" (matmuls over chunks, plain JAX, any device), "mosaic" (Pallas kernels for Hopper GPUs) or
"auto", the fastest one that runs here.
"""

from gt_jax.kernels.dispatch import choose_impl
from gt_jax.kernels.ssd import ssd, ssd_step
from gt_jax.kernels.wkv6 import wkv6, wkv6_step

__all__ = ["choose_impl", "ssd", "ssd_step", "wkv6", "wkv6_step"]
