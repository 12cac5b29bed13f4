"""Read a text with a model and record measures at every token.

The model reads the text in chunks and carries its state along, so texts of any length fit. The
memories are measured between chunks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.analysis.contributions import measure_block
from gt_jax.analysis.states import memories, norm
from gt_jax.models import LanguageModel, Params
from gt_jax.models.carry import first_state


class Trace(NamedTuple):
    """What a model of L layers did on T tokens, as NumPy arrays.

    loss: [T] float32 nats, -log p(token | those before); NaN for the first.
    guesses: [T, 3] int32, the tokens that were likeliest here before this one was seen. With
        `chances` [T, 3] float32, their probabilities. Meaningless for the first token.
    blocks: name -> [L, T] float32, fields of BlockMeasures; empty but for hybrids.
    states: part -> [L, M] float32 norms of `memories` after every `stride` tokens.
    stride: tokens between two points of `states`.
    """

    loss: np.ndarray
    guesses: np.ndarray
    chances: np.ndarray
    blocks: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    stride: int


def trace(
    model: LanguageModel, params: Params, ids: Sequence[int] | np.ndarray, *, points: int = 256
) -> Trace:
    """Read ids [T] from the start of a document; T at most model.config.max_positions for a GPT.

    Args:
        model, params: from `gt_jax.load`.
        ids: [T] int, at least one.
        points: the states are measured at this many places at most, and in a text with fewer
            tokens after every token.
    """
    T = len(ids)
    stride = -(-T // points)
    pad = -T % stride
    chunks = np.pad(np.asarray(ids, np.int32), (0, pad)).reshape(-1, stride)  # [M, stride]
    targets = np.pad(np.asarray(ids[1:], np.int32), (0, pad + 1)).reshape(-1, stride)
    tokens, states = jax.device_get(_read(model, params, chunks, targets))
    # The padding comes last, so no token sees it; a state that has seen padding is left out.
    whole = {name: norms[: T // stride].T for name, norms in states.items()}
    tokens = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], tokens)  # [T, ...]
    # A prediction belongs to the token after.
    shifted = {
        name: np.roll(tokens.pop(name), 1, axis=0) for name in ("loss", "guesses", "chances")
    }
    shifted["loss"][0] = np.nan
    return Trace(
        **shifted,
        blocks={name: x.T for name, x in tokens.items()},
        states=whole,
        stride=stride,
    )


@functools.partial(jax.jit, static_argnames="model")
def _read(model, params, chunks, targets):
    """Chunks and their next tokens [M, S] -> measures by token {[M, S, ...]}, norms {[M, L]}."""
    c = model.config

    def read(state, chunk):
        tokens, targets = chunk  # [S]
        output, sown = model.apply({"params": params}, tokens[None], state, mutable="activations")
        log_p = jax.nn.log_softmax(output.logits[0])  # [S, vocab]
        chances, guesses = jax.lax.top_k(jnp.exp(log_p), min(3, c.vocab_size))
        loss = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        measured = {"loss": loss, "guesses": guesses, "chances": chances}
        if c.architecture == "hybrid":
            blocks = [
                measure_block(c, params[name].get("fusion", {}), sown["activations"][name])
                for name in (f"blocks_{layer}" for layer in range(c.layers))
            ]
            by_layer = jax.tree.map(lambda *x: jnp.concatenate(x).T, *blocks)  # [S, L]
            measured |= {k: v for k, v in by_layer._asdict().items() if v is not None}
        kept = [memories(block) for block in output.state[: c.layers]]
        norms = {part: jnp.concatenate([norm(k[part]) for k in kept]) for part in kept[0]}  # [L]
        return output.state, (measured, norms)

    first = first_state(c, params, model.init_state(1))
    return jax.lax.scan(read, first, (chunks, targets))[1]
