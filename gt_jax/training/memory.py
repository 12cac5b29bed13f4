"""Memory: whether a run fits, and how a CPU run keeps its own."""

import ctypes
import functools
import os

import jax

from gt_jax.errors import InputError

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def check_fits(state, available: int | None = None) -> int:
    """Refuse a run whose parameters alone, with what training keeps of them, exceed the memory.

    Args:
        state: the TrainState, or its shapes from `jax.eval_shape`.
        available: bytes of one device; by default what it says of itself, or the machine's memory.

    Returns:
        The bytes that a step needs at least: parameters, their gradients, moments, carried states.
        Activations come on top, and depend on the batch and on model.remat.

    Raises:
        InputError: they do not fit; with sizes, and what makes them smaller.
    """
    if available is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = int(stats.get("bytes_limit") or machine)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    parameters, moments = size(state.params), size(state.opt_state)
    needed = 2 * parameters + moments + size(state.carry)
    if needed > available:
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        raise InputError(
            f"{count:,} parameters need {needed / 2**30:,.1f} GiB with their gradients and "
            f"optimizer ({moments / 2**30:,.1f} GiB), more than the {available / 2**30:,.1f} GiB "
            "of the device: lower model.dim or model.layers, or set optim.moments_dtype=bfloat16"
        )
    return needed


@functools.cache
def keep_freed_memory() -> None:
    """Make malloc reuse what a step frees instead of returning it to the system.

    XLA allocates a step's temporaries anew every time; getting gigabytes from the system page by
    page took a quarter of a step of configs/gf_mh.py. What a compilation frees is returned: it
    leaves hundreds of megabytes in pieces too small for those temporaries. Does nothing where the C
    library is not glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)

    def after(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration" and seconds > 1:
            malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)
