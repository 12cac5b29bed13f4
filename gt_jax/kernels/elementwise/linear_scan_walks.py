"""Kernels of linear scans: from the first token to the last, and their gradients, walked back.

linear_scan_rows.py says how they work. With u_t = decay_t ds_t, the gradient of the state that
token t reads, and g the cotangent of s:

    u_t = decay_t u_{t+1} + decay_t g_t,   dx_t = g_t + u_{t+1},   d decay_t = dx_t s_{t-1}
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_rows import Grid, Place, grid_for, run
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import loop
from gt_jax.kernels.pallas.splits import states_of_splits


def states_before(
    grid: Grid, inputs: dict, terms: Callable, state: jax.Array, *, reverse: bool
) -> jax.Array:
    """What each split starts its walk with, [B, splits, C].

    Args:
        grid: of the call.
        inputs: of the kernel, of which `terms` reads.
        terms: function of a Place and a token, as `Place.read` takes it.
        state: [B, C] before the first split; after the last if reverse.
        reverse: whether the walk is from the end.
    """
    if grid.splits == 1:
        return state[:, None]

    def body(refs):
        place = Place(grid, refs, reverse)

        def step(n, carry):
            kept, end = carry
            _, decays, xs = place.read(n, terms)
            _, end, product = place.fold(decays, xs, end)
            return product * kept, end

        kept, end = loop(grid.tiles, step, (rows.zeros(grid.row) + 1, rows.zeros(grid.row)))
        place.store_of_split(refs.kept_gmem, kept)
        place.store_of_split(refs.end_gmem, end)

    like = _of_splits(grid, state)
    name = "linear_scan_splits_" + ("backward" if reverse else "forward")
    ends = run(grid, body, name, len(state), inputs, {"kept": like, "end": like})
    inner = slice(1, None) if reverse else slice(None, -1)
    kept, end = (z[:, None, inner, :, None] for z in ends)
    states = states_of_splits(kept, end, state[:, None, :, None], reverse=reverse)
    return states.reshape(like.shape)


def states_of_tokens(
    name: str,
    inputs: dict,
    terms: Callable,
    state: jax.Array,
    length: int,
    dtype: jnp.dtype | None = None,
) -> list[jax.Array]:
    """s_t = decay_t s_{t-1} + x_t, [B, T, C], by a kernel of this name; [B, C] float32 at the end.

    Args:
        name: of the kernel.
        inputs: of the kernel, of which `terms` reads.
        terms: function of a Place and a token, as `Place.read` takes it; if dtype is given, its
            results are those of `Place.existing`.
        state: [B, C] before the first token.
        length: T.
        dtype: of s; None for float32 and no state at the end.
    """
    batch, channels = state.shape
    grid = grid_for(batch, length, channels)
    states = states_before(grid, inputs, terms, state, reverse=False)

    def body(refs):
        place = Place(grid, refs, reverse=False)

        def step(n, carry):
            tokens, decays, xs = place.read(n, terms)
            s, carry, _ = place.fold(decays, xs, carry)
            for token, decay, x in zip(tokens, decays, xs):
                s = decay * s + x
                place.store(refs.s_gmem, token, s if dtype is None else s.astype(dtype))
            return carry

        last = loop(grid.tiles, step, place.start())
        if dtype is not None:
            place.store_of_split(refs.last_gmem, last)

    like = jax.ShapeDtypeStruct((batch, length, channels), dtype or jnp.float32)
    outputs = {"s": like, "last": None if dtype is None else _of_splits(grid, state)}
    s, *last = run(grid, body, name, batch, inputs | {"states": states}, outputs)
    return [s, *(z[:, -1] for z in last)]


def gradients_of_tokens(
    name: str,
    inputs: dict,
    terms: Callable,
    gradients: Callable,
    s: jax.Array,
    state: jax.Array,
    d_last: jax.Array,
    outputs: dict,
    start: Callable[[Place], Any] = lambda place: None,
) -> list[jax.Array]:
    """The outputs of a kernel of this name that walks from the last token to the first.

    Args:
        name: of the kernel.
        inputs: of the kernel, of which `terms` and `gradients` read.
        terms: function of a Place and a token, as `Place.read` takes it, -> decay and g.
        gradients: function of a Place, a token, its dx, s of the token before in float32, and a
            total of the row of threads. It writes outputs of the token and returns the next total.
        s: [B, T, C], what `states_of_tokens` gave.
        state, d_last: [B, C] float32, the state before the first token and the cotangent of that
            behind the last.
        outputs: name -> what has the shape and dtype of the output. None for "d_state", [B, C] the
            gradient of state, and for "totals", [B, splits, rows, C] the last totals; float32 both.
        start: function of a Place -> the first total.
    """
    grid = grid_for(*s.shape)
    states = states_before(grid, inputs, terms, d_last, reverse=True)

    def body(refs):
        place = Place(grid, refs, reverse=True)
        before = place.of_sequence(refs.state_gmem)

        def step(n, carry):
            u, total = carry
            tokens, decays, gs = place.read(n, terms)
            earlier = place.states_earlier(tokens, before)
            u, after, _ = place.fold(decays, gs, u)
            for token, decay, g, s in zip(tokens, decays, gs, earlier):
                dx = g + u
                u = decay * dx
                total = gradients(place, token, dx, s, total)
            return after, total

        total = start(place)
        u, total = loop(grid.tiles, step, (place.start(), total))
        if "d_state" in outputs:
            place.store_of_split(refs.d_state_gmem, u)
        if "totals" in outputs:
            place.store_of_row(refs.totals_gmem, total)

    of_rows = jax.ShapeDtypeStruct((len(s), grid.splits, grid.number, state.shape[1]), jnp.float32)
    own: dict[str, Any] = {"d_state": _of_splits(grid, state), "totals": of_rows}
    like = {key: own.get(key, z) for key, z in outputs.items()}
    like = {key: jax.ShapeDtypeStruct(z.shape, z.dtype) for key, z in like.items()}
    inputs = inputs | {"states": states, "s": s, "state": state}
    results = run(grid, body, name, len(s), inputs, like)
    return [z[:, 0] if key == "d_state" else z for key, z in zip(like, results)]


def _of_splits(grid, state):
    """[B, splits, C] float32."""
    batch, channels = state.shape
    return jax.ShapeDtypeStruct((batch, grid.splits, channels), jnp.float32)
