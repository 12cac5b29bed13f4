"""Which implementation of a recurrence runs: the first that takes the call, or the one named."""

import jax

from gt_jax.kernels import hopper

_KERNEL_DTYPES = {"wkv6": "bfloat16 and float32", "ssd": "bfloat16"}


def dispatch(op, impls, impl, *args, **kwargs):
    """Calls impls[impl], or under "auto" the first whose call does not raise NotImplementedError.

    Args:
        op: name of the operation, for messages.
        impls: name -> function, fastest first.
        impl: "auto" or a key of impls.

    Raises:
        ValueError: impl is unknown, or was asked for by name and cannot run (says why).
    """
    if impl != "auto":
        if impl not in impls:
            raise ValueError(
                f"{op}: impl={impl!r} must be one of 'auto', {', '.join(map(repr, impls))}"
            )
        try:
            return impls[impl](*args, **kwargs)
        except NotImplementedError as reason:
            raise ValueError(f"{op}: impl={impl!r} cannot run here: {reason}") from reason
    for candidate in impls.values():
        try:
            return candidate(*args, **kwargs)
        except NotImplementedError:
            continue
    raise ValueError(f"{op}: no implementation takes these arguments")


def choose_impl(op):
    """What impl="auto" takes on this machine.

    Args:
        op: "wkv6" or "ssd".

    Returns:
        (name, reason): the implementation's name and a short reason to show a person.
    """
    if op not in _KERNEL_DTYPES:
        raise ValueError(f"op={op!r} must be 'wkv6' or 'ssd'")
    device = jax.devices()[0].device_kind
    if hopper.unsupported() is None:
        dtypes = _KERNEL_DTYPES[op]
        return "mosaic", f"Pallas kernels for {device}, {dtypes}; other dtypes take chunked"
    return "chunked", f"portable matmuls over chunks, runs on {device}"


def resets_from_segments(segment_ids):
    """[B, T] ids -> [B, T] bool, True where a token starts a new segment (never at t = 0)."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jax.numpy.pad(starts, ((0, 0), (1, 0)))
