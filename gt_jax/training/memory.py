"""Host memory of a CPU run."""

import ctypes
import functools

import jax

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


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
