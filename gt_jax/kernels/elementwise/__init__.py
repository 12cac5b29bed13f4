"""Pallas kernels of what surrounds the recurrences in a mixer: blends, convolution and norms.

In plain JAX each of them reads and writes tensors as wide as the model several times; a kernel
reads its inputs once and writes its outputs once, forward and backward. NVIDIA GPUs since compute
capability 8.0, bfloat16; the plain forms stand in gt_jax.models.
"""
