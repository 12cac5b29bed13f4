"""Memory: what a model needs and there is, and how a CPU run keeps it."""

import ctypes
import functools
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from gt_jax.config import Optim
from gt_jax.errors import InputError

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory() -> None:
    """Make malloc reuse what a step frees instead of returning it to the system.

    XLA allocates a step's temporaries anew every time; getting gigabytes from the system page by
    page took a quarter of a step of configs/gf_mh.py. What a compilation frees is returned: it
    leaves hundreds of megabytes in blocks too small for those temporaries. Does nothing where the C
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

    def after(event: str, duration_secs: float, **_):
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 1:
            malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)


def check_fits(
    parameters: int,
    optim: Optim,
    fields: str,
    trained: int | None = None,
    *,
    devices: int = 1,
) -> None:
    """Refuse a model before it is compiled if its training state alone exceeds the memory.

    Activations come on top, and depend on the batch and on model.remat.

    Args:
        parameters: how many the model has.
        optim: uses what decides how many copies of the parameters there are.
        fields: what the user set to get them, for the message: "model.dim=512 with model.layers=8".
        trained: how many of them are trained; None for all.
        devices: over which they are cut, parallel.fsdp.

    Raises:
        InputError: float32 parameters, their gradients and what the optimizer keeps need more bytes
            than the device (or, on a CPU, this process) can have.
    """
    have, where = _memory()
    trained = parameters if trained is None else trained
    # Vectors are copied to each device, matrices are cut: this is the least that one can have.
    share = min(_sharing() / devices, 1)
    need = share * _state_bytes(parameters, trained, optim)
    if have is not None and need > have:
        smaller = ""
        narrow = replace(optim, moments_dtype="bfloat16")
        if share * _state_bytes(parameters, trained, narrow) <= have:
            smaller = ", or set optim.moments_dtype=bfloat16"
        if jax.device_count() > max(devices, _sharing()):
            smaller += f", or raise parallel.fsdp={devices}"
        raise InputError(
            f"{fields} makes {parameters:,} parameters, which need {need / 1e9:,.0f} GB with their "
            f"gradients and the optimizer's state{' on each device' if share < 1 else ''}, and "
            f"{where} has {have / 1e9:,.0f} GB; lower them{smaller}"
        )


def _state_bytes(parameters: int, trained: int, optim: Optim) -> int:
    """Of parameters in float32; of trained ones also gradients, averages and (least) moments."""
    moments = {"muon": 1}.get(optim.name, 2)
    averages = (optim.ema > 0) + (optim.name == "schedule_free")
    of_trained = 4 * (1 + averages) + moments * jnp.dtype(optim.moments_dtype).itemsize
    return 4 * parameters + trained * of_trained


def _sharing() -> int:
    """How many devices have the same memory: those of a CPU are parts of this process."""
    return jax.local_device_count() if jax.local_devices()[0].platform == "cpu" else 1


def _memory() -> tuple[int | None, str]:
    """(bytes that a model can have, whose they are)."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit"), f"a {device.device_kind}"
    try:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None, "this machine"
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's share
        try:
            host = min(host, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):
            continue
    return host, "this machine"
