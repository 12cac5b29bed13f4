"""Rows of a table by index, with a gradient that has the same bits every time.

The gradient of a gather adds rows to the table in whatever order a GPU's threads reach it. Here the
order is fixed: rows are sorted by index, then summed in blocks by products with 0 and 1.
"""

import jax
import jax.numpy as jnp

# Rows summed by one product. A table of no more rows needs no sorting: one product with all of it.
_BLOCK = 128


@jax.custom_vjp
def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], NaN where there is no row.

    Args:
        table: [V, D] float.
        index: [...] int, at least 0.

    Returns:
        [..., D] in the dtype of the table.
    """
    return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def _forward(table, index):
    return lookup(table, index), (index, jnp.zeros((table.shape[0], 0), table.dtype))


def _backward(residuals, g):
    index, like = residuals
    rows = g.reshape(-1, g.shape[-1])
    return sum_by_index(rows, index.ravel(), like.shape[0]).astype(like.dtype), None


lookup.defvjp(_forward, _backward)


def sum_by_index(rows: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """out[v] = sum of the rows n with index_n = v, in an order that N and the indices fix.

    Args:
        rows: [N, D] float.
        index: [N] int; a row whose index is not below `size` counts nowhere.
        size: V.

    Returns:
        [V, D] in the dtype of the rows.
    """
    if size <= _BLOCK:
        return _product("nv,nd->vd", index[:, None] == jnp.arange(size), rows)
    padding = -len(index) % _BLOCK
    order = jnp.argsort(index, stable=True)
    rows = jnp.pad(rows[order], ((0, padding), (0, 0))).reshape(-1, _BLOCK, rows.shape[1])
    index = jnp.pad(index[order], (0, padding), constant_values=size)  # ascending
    blocks = index.reshape(-1, _BLOCK)  # [M, C]

    # Sums inside a block, [M, C, D]: each stands where its index first occurs there.
    equal = blocks[:, :, None] == blocks[:, None, :]
    sums = _product("mij,mjd->mid", equal, rows)
    # An index that continues into other blocks is what they begin with: for each block, [M, D], the
    # sum of what it and all blocks before it hold of its first index, if they begin with it too.
    begins = blocks[:, 0]
    before = jnp.tri(len(begins), dtype=bool) & (begins[:, None] == begins)
    running = _product("ab,bd->ad", before, sums[:, 0])

    changes, edge = jnp.diff(index) != 0, jnp.ones(1, bool)
    first = _places(index, jnp.concatenate([edge, changes]), size)  # [V], -1 without a row
    last = _places(index, jnp.concatenate([changes, edge]), size)
    here = jnp.arange(size)
    begin = sums.reshape(-1, rows.shape[-1])[first]
    begin = jnp.where((begins[first // _BLOCK] == here)[:, None], 0, begin)
    end = last // _BLOCK
    more = jnp.where((begins[end] == here)[:, None], running[end], 0)
    return jnp.where((first >= 0)[:, None], begin + more, 0)


def _places(index, chosen, size):
    """[size] where each value stands in `index`, of [N] places those chosen; -1 where nowhere."""
    place = jnp.arange(len(index))
    # Every target is another, so that a GPU need not care about the order of writing.
    target = jnp.where(chosen & (index < size), index, size + place)
    nowhere = jnp.full(size, -1, place.dtype)
    return nowhere.at[target].set(place, mode="drop", unique_indices=True)


def _product(equation, zeros_and_ones, rows):
    left = zeros_and_ones.astype(rows.dtype)
    return jnp.einsum(equation, left, rows, precision=jax.lax.Precision.HIGHEST)
