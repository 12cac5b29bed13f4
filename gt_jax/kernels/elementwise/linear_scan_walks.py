"""Kernels of linear scans: from the first token to the last, and their gradients, walked back.

linear_scan_rows.py says how they work. With u_t = decay_t ds_t, the gradient of the state that
token t reads, and g the cotangent of s:

    u_t = decay_t u_{t+1} + decay_t g_t,   dx_t = g_t + u_{t+1},   d decay_t = dx_t s_{t-1}
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.elementwise.linear_scan_copies import Stash, bytes_read, parts_of
from gt_jax.kernels.elementwise.linear_scan_grids import Grid, grid_of_gradient, grid_of_states
from gt_jax.kernels.elementwise.linear_scan_rows import Place, run
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import loop
from gt_jax.kernels.pallas.splits import states_of_splits


class Terms(NamedTuple):
    """What kernels read of a token, and decay and x (or the cotangent g) of it."""

    given: Callable  # function of a Place and a token -> arrays as they lie in memory, and others
    of_given: Callable  # function of a Place, a token and what is given of it -> decay and x
    reads: tuple = ()  # what of_given needs of inputs [B, T, n C]: (name, which of the n)

    def given_of(self, place: Place, tokens: list) -> list:
        """What is given of each token."""
        return [self.given(place, token) for token in tokens]

    def of_tokens(self, place: Place, tokens: list, given: Iterable) -> Iterator:
        """Decay and x of one token after another, so that those of few are held at a time."""
        return (self.of_given(place, *z) for z in zip(tokens, given))


def states_before(
    grid: Grid, inputs: dict, terms: Terms, state: jax.Array, *, reverse: bool
) -> jax.Array:
    """What each split starts its walk with, [B, splits, C].

    Args:
        grid: of the call.
        inputs: of the kernel, of which `terms` reads.
        terms: of a token.
        state: [B, C] before the first split; after the last if reverse.
        reverse: whether the walk is from the end.
    """
    if grid.splits == 1:
        return state[:, None]

    def body(refs):
        place = Place(grid, refs, len(state), reverse)

        def step(n, carry):
            kept, end = carry
            tokens = place.tokens(n)
            found = terms.of_tokens(place, tokens, terms.given_of(place, tokens))
            _, end, product = place.fold(found, end, lax.rem(n, jnp.int32(2)))
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
    terms: Terms,
    state: jax.Array,
    length: int,
    dtype: jnp.dtype | None = None,
) -> list[jax.Array]:
    """s_t = decay_t s_{t-1} + x_t, [B, T, C], by a kernel of this name; [B, C] float32 at the end.

    Args:
        name: of the kernel.
        inputs: of the kernel, of which `terms` reads.
        terms: of a token; if dtype is given, results of `Place.existing`.
        state: [B, C] before the first token.
        length: T.
        dtype: of s; None for float32 and no state at the end.
    """
    batch, channels = state.shape
    grid = grid_of_states(batch, length, channels, bytes_read(inputs, channels))
    states = states_before(grid, inputs, terms, state, reverse=False)
    stash = Stash(grid, inputs, channels, parts_of(inputs, channels)) if grid.copied else None

    def body(refs):
        place = Place(grid, refs, batch, reverse=False)

        def compute(n, tokens, found, s, coming=lambda: None):
            """The state after tile n, and what `coming` reads meanwhile."""
            found = list(found)
            ahead = coming()  # on its way from here on
            s, after, _ = place.fold(found, s, lax.rem(n, jnp.int32(2)))
            for token, (decay, x) in zip(tokens, found):
                s = decay * s + x
                place.store(refs.s_gmem, token, s if dtype is None else s.astype(dtype))
            return after, ahead

        def step(n, carry):
            (s, given), tokens = carry, place.tokens(n)
            coming = lambda: terms.given_of(place, place.tokens_after(n))
            return compute(n, tokens, terms.of_tokens(place, tokens, given), s, coming)

        def step_copied(n, tokens, values, s):
            given = map(values, range(grid.span))
            return compute(n, tokens, terms.of_tokens(place, tokens, given), s)[0]

        if stash is None:
            first = terms.given_of(place, place.tokens(jnp.int32(0)))
            last, _ = loop(grid.tiles, step, (place.start(), first))
        else:
            read = lambda tokens, j: terms.given(place, tokens[j])
            last = stash.walk(place, read, step_copied, place.start())
        if dtype is not None:
            place.store_of_split(refs.last_gmem, last)

    like = jax.ShapeDtypeStruct((batch, length, channels), dtype or jnp.float32)
    outputs = {"s": like, "last": None if dtype is None else _of_splits(grid, state)}
    s, *last = run(grid, body, name, batch, inputs | {"states": states}, outputs, stash)
    return [s, *(z[:, -1] for z in last)]


def gradients_of_tokens(
    name: str,
    inputs: dict,
    terms: Terms,
    gradients: Callable,
    s: jax.Array,
    state: jax.Array,
    d_last: jax.Array,
    outputs: dict,
) -> list[jax.Array]:
    """The outputs of a kernel of this name that walks from the last token to the first.

    Args:
        name: of the kernel.
        inputs: of the kernel, of which `terms` and `gradients` read.
        terms: of a token, g for x.
        gradients: function of a Place, a token, what is given of it, its dx and s of the token
            before, both float32. It writes outputs of the token and returns what it adds to total.
        s: [B, T, C], what `states_of_tokens` gave.
        state, d_last: [B, C] float32, the state before the first token and the cotangent of that
            behind the last.
        outputs: name -> what has the shape and dtype of the output. None for "d_state", [B, C] the
            gradient of state, and for "total", [B, splits, C] sums over tokens; float32 both.
    """
    batch, length, channels = s.shape
    of_tokens = inputs | {"s": s}
    grid = grid_of_gradient(batch, length, channels, bytes_read(of_tokens, channels))
    states = states_before(grid, inputs, terms, d_last, reverse=True)
    stash = Stash(grid, of_tokens, channels, terms.reads) if grid.copied else None

    def body(refs):
        place = Place(grid, refs, batch, reverse=True)
        before = place.of_sequence(refs.state_gmem)

        def read(tokens, j):
            return terms.given(place, tokens[j]), place.state_earlier(tokens, j, before)

        def compute(n, tokens, values, carry, coming=lambda j: None):
            """Tile n, of which values(j) is what was read of tokens[j]; coming(j) reads ahead."""
            u, total = carry
            found = (terms.of_given(place, tokens[j], values(j)[0]) for j in range(grid.span))
            u, after, _ = place.fold(found, u, lax.rem(n, jnp.int32(2)))
            ahead = []
            for j, token in enumerate(tokens):
                given, s_before = values(j)
                decay, g = terms.of_given(place, token, given)  # again: few registers
                dx = g + u
                u = decay * dx
                added = gradients(place, token, given, dx, s_before.astype(jnp.float32))
                total = total if added is None else total + added
                ahead.append(coming(j))  # into the registers of this one
            return (after, total), ahead

        def step(n, carry):
            values, following = carry[1], place.tokens_after(n)
            coming = lambda j: read(following, j)
            return compute(n, place.tokens(n), lambda j: values[j], carry[0], coming)

        carry = place.start(), rows.zeros(grid.row) if "total" in outputs else None
        if stash is None:
            tokens = place.tokens(jnp.int32(0))
            first = [read(tokens, j) for j in range(grid.span)]
            (u, total), _ = loop(grid.tiles, step, (carry, first))
        else:
            step_copied = lambda *given: compute(*given)[0]
            u, total = stash.walk(place, read, step_copied, carry)
        if "d_state" in outputs:
            place.store_of_split(refs.d_state_gmem, u)
        if "total" in outputs:
            place.store_sum(refs.total_gmem, total, jnp.int32(grid.tiles % 2))

    of_splits = _of_splits(grid, state)
    like = {key: of_splits if z is None else z for key, z in outputs.items()}
    like = {key: jax.ShapeDtypeStruct(z.shape, z.dtype) for key, z in like.items()}
    inputs = of_tokens | {"states": states, "state": state}
    results = run(grid, body, name, batch, inputs, like, stash)
    return [z[:, 0] if key == "d_state" else z for key, z in zip(like, results)]


def _of_splits(grid, state):
    """[B, splits, C] float32."""
    batch, channels = state.shape
    return jax.ShapeDtypeStruct((batch, grid.splits, channels), jnp.float32)
