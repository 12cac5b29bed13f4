"""What a process that trains asks of JAX's backend."""

import jax

from gt_jax.training.memory import keep_freed_memory

# XLA would compile each fusion in several ways and time them, a sixth of the seconds to the first
# step, and train no faster (measured on an H100, configs/gf_mh_base.py).
_ON_GPU = {"xla_gpu_experimental_enable_fusion_autotuner": False}


def prepare() -> None:
    """Make compiling and training quick on the backend at hand; changes settings of the process."""
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    # On GPUs, one kernel for all random numbers: XLA compiles another for each parameter otherwise,
    # which takes minutes for a model of 12 layers. The numbers are the same.
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def compiler_options() -> dict | None:
    """What the compiler is told about a training step; for jax.jit."""
    return _ON_GPU if jax.default_backend() == "gpu" else None
