"""What a model makes of a longer context."""

import functools

import jax
import jax.numpy as jnp
import optax


def by_context(model, params, *, rows, lengths, window):
    """Mean loss of the last tokens of rows [N, T + 1], read from the last c of the T before them.

    Args:
        lengths: numbers c, at most T; each below `window` or a multiple of it.
        window: tokens read at a time, T a multiple of it.

    Returns:
        [lengths] float32 nats.
    """
    T = rows.shape[1] - 1
    windows = rows[:, :-1].reshape(len(rows), -1, window).swapaxes(0, 1)  # [windows, N, window]

    def read(unread, i, carry):
        segments = jnp.broadcast_to(i * window + jnp.arange(window) >= unread, windows.shape[1:])
        logits, state = model.apply(
            {"params": params}, jnp.asarray(windows)[i], carry[1], segment_ids=segments.astype(int)
        )
        return logits[:, -1], state

    def of_length(length):
        empty = jnp.zeros((len(rows), model.config.vocab_size)), model.init_state(len(rows))
        read_on = functools.partial(read, T - length)
        logits, _ = jax.lax.fori_loop((T - length) // window, len(windows), read_on, empty)
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, -1]).mean()

    return jax.lax.map(of_length, jnp.array(lengths))
