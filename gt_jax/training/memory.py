"""Host memory of a CPU run."""

import ctypes

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Make malloc reuse what a step frees instead of returning it to the system.

    XLA allocates a step's temporaries anew every time; getting gigabytes from the system page by
    page took a quarter of a step of configs/gf_mh.py. Does nothing where the C library is not
    glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
