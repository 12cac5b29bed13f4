"""Programs of a first sample, compiled before there are parameters for it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gt_jax.generation.contexts import Context, start_state
from gt_jax.generation.requests import Request
from gt_jax.generation.slots import (
    empty_slots,
    fill_slot,
    lower_advance,
    one_slot,
    rows_of_batch,
)
from gt_jax.generation.weights import prepare_weights
from gt_jax.models import LanguageModel


def lower_ahead(model: LanguageModel, params: Any, request: Request) -> jax.stages.Lowered:
    """Compile the small programs that `generate` calls and lower the large one, the decode steps.

    For a thread, while nothing is sampled yet. What `generate` calls later is not traced, lowered
    or compiled again, except the prefill of a prompt longer than the smallest chunk.

    Args:
        model: of the parameters.
        params: jax.ShapeDtypeStruct of each parameter, with the sharding that it will have.
        request: as it will be made: its prompt, [T] ids, and its sampling settings.

    Returns:
        What remains to be compiled.
    """
    rows = rows_of_batch(1)
    weights = _compiled(prepare_weights, model, params, rows)
    slots = _compiled(empty_slots, model, params, rows)
    state = _compiled(start_state, model, params)
    seen = np.zeros(model.config.vocab_size, bool)
    waiting = np.zeros(1, np.int32)
    one = one_slot(request, Context(state, waiting, seen, len(waiting)))
    slots = _compiled(fill_slot, slots, 0, one)
    return lower_advance(model, weights, slots, narrows=request.narrows)


def _compiled(function: Any, *args: Any) -> Any:
    """Compile a jitted function for these arguments; the shapes and shardings of its results."""
    lowered = function.lower(*args)
    shardings = lowered.compile().output_shardings
    shape: Callable = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(shape, lowered.out_info, shardings)
