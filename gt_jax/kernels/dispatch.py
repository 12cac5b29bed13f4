"""Which implementation of a recurrence runs: the first that takes the call, or the one named."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gt_jax.kernels.pallas.devices import hopper_unsupported, portable_unsupported


class Implementation(NamedTuple):
    """A way to compute an operation.

    Its module holds the function OP_NAME, which raises NotImplementedError for a call it does not
    take, and TAKES, which says for which dtypes and sizes that is not so (None for all).
    """

    module: str  # loaded when first used, as Pallas takes a while to load
    what: str
    unsupported: Callable[[], str | None] = lambda: None  # why it can run nothing here


# operation -> name -> implementation, fastest first
IMPLEMENTATIONS = {
    op: {
        "mosaic": Implementation(
            f"gt_jax.kernels.{op}.hopper", "Pallas kernels for Hopper GPUs", hopper_unsupported
        ),
        "portable": Implementation(
            f"gt_jax.kernels.{op}.portable",
            "Pallas kernels for NVIDIA GPUs since compute capability 8.0",
            portable_unsupported,
        ),
        "chunked": Implementation(f"gt_jax.kernels.{op}.chunked", "matmuls over chunks"),
        "reference": Implementation(f"gt_jax.kernels.{op}.reference", "token by token"),
    }
    for op in ("wkv6", "ssd")
}


def dispatch(op: str, impl: str, *args: Any) -> tuple[jax.Array, jax.Array]:
    """Computes an operation by one implementation.

    Args:
        op: "wkv6" or "ssd".
        impl: a name in IMPLEMENTATIONS[op], or "auto" for the first that takes the call: the first
            that does not raise NotImplementedError.
        args: arguments of OP_reference.

    Returns:
        The output and the final state.

    Raises:
        ValueError: impl is unknown, or was asked for by name and cannot run (says why).
    """
    known = IMPLEMENTATIONS[op]
    if impl != "auto":
        if impl not in known:
            raise ValueError(
                f"{op}: impl={impl!r} must be one of 'auto', {', '.join(map(repr, known))}"
            )
        try:
            return _run(op, impl, args)
        except NotImplementedError as reason:
            raise ValueError(f"{op}: impl={impl!r} cannot run here: {reason}") from reason
    for name in known:
        try:
            return _run(op, name, args)
        except NotImplementedError:
            continue
    raise ValueError(f"{op}: no implementation takes these arguments")


def _run(op, name, args):
    implementation = IMPLEMENTATIONS[op][name]
    if reason := implementation.unsupported():
        raise NotImplementedError(reason)
    function = getattr(importlib.import_module(implementation.module), f"{op}_{name}")
    return function(*args)


def choose_impl(op: str) -> tuple[str, str]:
    """What impl="auto" takes on this machine.

    Args:
        op: "wkv6" or "ssd".

    Returns:
        (name, reason): the name of the implementation, and what it is, what it takes and what
        takes all other calls, to show a person.

    Raises:
        ValueError: op is unknown.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op={op!r} must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    known = IMPLEMENTATIONS[op]
    name, *others = [name for name, found in known.items() if found.unsupported() is None]
    reason = f"{known[name].what}, on {jax.devices()[0].device_kind}"
    takes = lambda name: importlib.import_module(known[name].module).TAKES
    if takes(name) is not None:
        last = next(n for n, other in enumerate(others) if takes(other) is None)
        reason += f": {takes(name)}; other calls take {' or '.join(others[: last + 1])}"
    return name, reason
