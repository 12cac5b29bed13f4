"""Where the Pallas kernels can run; loads no Pallas itself.

A kernel is written once. On an H100 or H200 it is compiled; inside `simulated("interpret")` it runs
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
    if jax.__version_info__ < OLDEST_JAX:
        needed = ".".join(map(str, OLDEST_JAX))
        return f"the Pallas kernels need JAX {needed} or newer; this is JAX {jax.__version__}"
    if simulation():
        return None
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        return (
            "the Pallas kernels need a Hopper GPU (H100, H200; compute capability 9.0); "
            f"this is {device.device_kind} under JAX {jax.__version__}"
        )
    return None
