"""What a process that trains asks of JAX's backend."""

import jax

from gt_jax.training.memory import keep_freed_memory


def prepare() -> None:
    """Make compiling and training quick on the backend at hand; changes settings of the process."""
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    # On GPUs, one kernel for all random numbers: XLA compiles another for each parameter otherwise,
    # which takes minutes for a model of 12 layers. The numbers are the same.
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
