"""The C library's heap of a program that computes on a CPU: what a step frees, the next one gets.

XLA allocates the temporaries of every execution anew, 1.3 GB a step of configs/gf_mh.py. glibc maps
a block that large and unmaps it when it is freed, and the system fills each page with zeros at its
first use: as much CPU time as half of the arithmetic. Kept, the pages cost nothing.
"""

import ctypes
import functools
import os
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

# Parameters of glibc's mallopt(3). Threads must share one heap: in one of a thread's own, a block
# of 64 MB or more is mapped whatever M_MMAP_MAX says.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
# Who sets one of these has chosen already.
_OF_THE_USER = ("ARENA_MAX", "ARENA_TEST", "MMAP_MAX_", "MMAP_THRESHOLD_")
_OF_THE_USER += ("TOP_PAD_", "TRIM_THRESHOLD_")
_GROWTH, _LEAST_GROWTH = 1.1, 128 * 2**20  # of the heap, after which unused pages are returned
_SECONDS = 0.1  # from one look at the heap to the next


def prepare() -> None:
    """Keep freed memory if JAX will choose a CPU.

    A program calls this before it imports NumPy, whose threads take heaps of their own, which
    others then share. Where only JAX can say that there is no GPU, nothing happens here; training
    calls `keep_freed_memory` later, and helps less.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        on_cpu = platforms.split(",")[0] == "cpu"
    else:
        others = any(find_spec(name) for name in ("jax_plugins", "libtpu"))
        on_cpu = not others and not metadata.entry_points(group="jax_plugins")
    if on_cpu:
        keep_freed_memory()


@functools.cache
def keep_freed_memory() -> None:
    """Make malloc keep what is freed for the next block instead of returning it to the system.

    Holes that nothing fits into are returned whenever the heap has grown, and so is what a
    compilation frees: it leaves hundreds of megabytes in small blocks. Does nothing where malloc is
    not glibc's (other systems, musl, jemalloc by LD_PRELOAD) or the environment tunes it.
    """
    libc = _glibc()
    if libc is None or _tuned(os.environ):
        return
    for parameter, value in _SETTINGS.values():
        libc.mallopt(parameter, value)
    import jax  # only now: it imports NumPy

    def after(event: str, duration_secs: float, **_):
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 1:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)
    threading.Thread(target=_return_holes, args=(libc,), name="heap", daemon=True).start()


def _glibc() -> ctypes.CDLL | None:
    """The C library, None where it is not glibc or its malloc is not the process's."""
    try:
        libc, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        places = {ctypes.cast(one.malloc, ctypes.c_void_p).value for one in (libc, process)}
        if len(places) > 1 or not (libc.mallopt and libc.malloc_trim and libc.gnu_get_libc_version):
            return None
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None
    return libc


def _tuned(environment: Mapping[str, str]) -> bool:
    own = any(f"MALLOC_{name}" in environment for name in _OF_THE_USER)
    return own or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")


def _return_holes(libc: ctypes.CDLL) -> None:
    """Return unused pages each time the heap is larger than ever.

    A small block inside of a step's hole makes the next step take new pages behind it. Without
    this, two or three times the memory of a step would stay; the heap stops growing after them.
    """
    largest = libc.sbrk(0) - (start := _start_of_heap())
    while True:
        time.sleep(_SECONDS)
        size = libc.sbrk(0) - start
        if size > max(largest * _GROWTH, largest + _LEAST_GROWTH):
            libc.malloc_trim(0)
            largest = size


def _start_of_heap() -> int:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            if line.rstrip().endswith("[heap]"):
                return int(line.split("-")[0], 16)
    return 0
