"""Where the Pallas kernels can run; loads no Pallas itself.

A kernel is written once. On its GPU it is compiled; inside `simulated("interpret")` it runs
on any machine in JAX's interpreter, which checks values and races; inside `simulated("lower")` it
may be traced and lowered for a GPU that is not there, which checks what the compiler accepts.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

OLDEST_JAX = (0, 11, 2)  # first release whose Pallas has all that the kernels use

_simulation = contextvars.ContextVar("simulation", default=None)


@contextlib.contextmanager
def simulated(mode: str) -> Iterator[None]:
    """Kernels traced inside are interpreted ("interpret") or only lowered ("lower").

    A function that was jitted before keeps what it was traced as.

    Args:
        mode: "interpret" or "lower".
    """
    token = _simulation.set(mode)
    try:
        yield
    finally:
        _simulation.reset(token)


def simulation() -> str | None:
    """What stands in for a GPU here: "interpret", "lower" or None."""
    return _simulation.get()


def interpreting() -> bool:
    """True where kernels run in the interpreter."""
    return simulation() == "interpret"


def hopper_unsupported() -> str | None:
    """Why no kernel for Hopper GPUs can run here, or None.

    The reason names the device, the JAX version and what is needed.
    """
    return _too_old() or _other_device(
        lambda capability: capability == (9, 0),
        "the Hopper kernels need an H100 or H200 (compute capability 9.0)",
    )


def portable_unsupported() -> str | None:
    """Why no portable kernel can run here, or None; as hopper_unsupported."""
    return _too_old() or _other_device(
        lambda capability: capability >= (8, 0),
        "the portable kernels need an NVIDIA GPU since compute capability 8.0 (A100, A10, L4, RTX "
        "30 and newer), others take impl='chunked'",
    )


def _too_old():
    if jax.__version_info__ >= OLDEST_JAX:
        return None
    needed = ".".join(map(str, OLDEST_JAX))
    return f"the Pallas kernels need JAX {needed} or newer; this is JAX {jax.__version__}"


def _other_device(serves, needed):
    if simulation():
        return None
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None:
        if serves(tuple(map(int, capability.split(".")))):
            return None
        found = f"{device.device_kind} ({capability})"
    else:
        found = device.device_kind
    return f"{needed}; this is {found} under JAX {jax.__version__}"
