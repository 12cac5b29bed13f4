"""Argument checks of the public operations; every message names the operation and the argument."""

import jax
import jax.numpy as jnp


def rank(op: str, **arrays: tuple[jax.Array, int]) -> tuple[int, ...]:
    """Shape of the one array given as name=(array, rank)."""
    ((name, (array, expected)),) = arrays.items()
    if array.ndim != expected:
        raise ValueError(f"{op}: {name} has shape {array.shape}; it must have {expected} axes")
    if 0 in array.shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}; every axis must be at least 1")
    return array.shape


def shapes(op: str, **arrays: tuple[jax.Array | None, tuple[int, ...]]) -> None:
    """Each name=(array or None, shape) has that shape."""
    for name, (array, expected) in arrays.items():
        if array is not None and array.shape != expected:
            raise ValueError(f"{op}: {name} has shape {array.shape}; it must be {expected}")


def same_float_dtype(op: str, **arrays: jax.Array) -> None:
    """All arrays share one floating dtype."""
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1 or not all(
        jnp.issubdtype(d, jnp.floating) for d in dtypes.values()
    ):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: {found}; they must share one floating dtype")


def precision(op: str, value: str) -> None:
    """The precision is one we know."""
    if value not in ("default", "highest"):
        raise ValueError(f"{op}: precision={value!r} must be 'default' or 'highest'")


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """States are float32, or float64 when any input is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
