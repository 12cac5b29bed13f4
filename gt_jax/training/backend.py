"""What a process that trains asks of JAX's backend and of Python."""

import contextlib
import sys
import threading

import jax
import numpy as np

from gt_jax.training.memory import keep_freed_memory

# Seconds after which a thread that computes in Python gives its lock to one that waits. A step
# takes the lock back several times, after each wait for the device. While Orbax writes behind the
# run, or a program is traced, each would take Python's own 5 ms, more than a small step.
_TURN = 0.0002


def prepare() -> None:
    """Make compiling and training quick on the backend at hand; changes settings of the process."""
    sys.setswitchinterval(min(_TURN, sys.getswitchinterval()))
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    else:
        # No daemon: a process that ends early, of a wrong setting, waits until JAX is at rest.
        threading.Thread(target=take_memory, name="memory").start()
    # On GPUs, one kernel for all random numbers: XLA compiles another for each parameter otherwise,
    # which takes minutes for a model of 12 layers. The numbers are the same.
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def take_memory() -> None:
    """Have JAX take the devices' memory, as the first array on each does.

    On a large GPU that is seconds, in which a thread that calls this leaves Python to others. An
    error is told by what needs the memory.
    """
    with contextlib.suppress(Exception):
        for device in jax.local_devices():
            jax.device_put(np.zeros((), np.int32), device)
