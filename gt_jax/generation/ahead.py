"""A sample by two programs, which are compiled or kept before there are parameters for it.

What `generate` does for one prompt, the tokens too, but for rounding on a GPU: nothing is tried out
there to compile these. Its five programs serve any number of requests.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from gt_jax import compilation
from gt_jax.finite import check_computed
from gt_jax.generation.contexts import PREFILL_CHUNKS, Context, prefill, start_state
from gt_jax.generation.requests import Request, check_request
from gt_jax.generation.slots import (
    empty_slots,
    fill_slot,
    lower_advance,
    one_slot,
    rows_of_batch,
)
from gt_jax.generation.weights import prepare_weights
from gt_jax.models import LanguageModel, Params
from gt_jax.models.carry import first_state


def lower_ahead(
    model: LanguageModel, prompt: np.ndarray
) -> dict[str, Callable[[Any], jax.stages.Lowered]]:
    """The programs of `sample`, which depend on the model and the prompt's length alone.

    Not among them is the prefill of a prompt longer than the smallest chunk.

    Args:
        model: of the parameters.
        prompt: [T] ids.

    Returns:
        Name -> a function that lowers the program. It takes a jax.ShapeDtypeStruct for each
        parameter, with its sharding on the one device where all parameters will be.
    """

    def arguments(params):
        state = None
        if _is_long(prompt):
            state = jax.eval_shape(functools.partial(start_state, model), params)
            state = _placed(state, _device(params))
        return model, params, one_slot(Request(prompt), _context(model, prompt, state))

    def burst(params):
        begun = _placed(_begin().eval_shape(*arguments(params)), _device(params))
        return lower_advance(model, *begun, narrows=False)

    return {"begin": lambda params: _begin().lower(*arguments(params)), "burst": burst}


def sample(
    model: LanguageModel,
    params: Params,
    prompt: np.ndarray,
    *,
    programs: Mapping[str, Callable],
    max_tokens: int,
    seed: int = 0,
) -> Iterator[int]:
    """Like `generate` with these settings, by programs of `lower_ahead`.

    Args:
        model: of the programs.
        params: where the programs were lowered for.
        prompt: [T] ids, as many as the programs were lowered for.
        programs: name -> the compiled program.
        max_tokens, seed: of a Request.

    Raises:
        InputError: at once, if the request is impossible for this model.
    """
    request = Request(prompt, max_tokens=max_tokens, seed=seed)
    check_request(model, request, None)
    return _drawn(model, params, request, programs)


def _drawn(model, params, request, programs) -> Iterator[int]:
    prompt, left = request.prompt, request.max_tokens
    context = _context(model, prompt, None)
    if _is_long(prompt):
        context = prefill(model, params, prompt)
        context = context._replace(state=jax.device_put(context.state, _device(params)))
    weights, slots = programs["begin"](params, one_slot(request, context))
    while left > 0:
        slots, drawn = programs["burst"](weights, slots)
        tokens, log_probabilities, *_ = (x[:, 0] for x in jax.device_get(drawn))
        drew = tokens >= 0
        check_computed(log_probabilities[drew])
        left -= drew.sum()
        yield from tokens[drew].tolist()


@functools.cache
def _begin():
    options = compilation.options(compilation.UNTIMED)
    return jax.jit(_begun, static_argnames="model", compiler_options=options)


def _begun(model, params, one):
    """Weights for decoding, and slots with the one that a sample needs."""
    rows = rows_of_batch(1)
    if one.state is None:
        one = one._replace(state=first_state(model.config, params, model.init_state(1)))
    slots = fill_slot(empty_slots(model, params, rows), 0, one)
    return prepare_weights(model, params, rows), slots


def _is_long(prompt: np.ndarray) -> bool:
    """Whether a prompt is not read by the decode steps alone."""
    return len(prompt) > PREFILL_CHUNKS[0]


def _context(model: LanguageModel, prompt: np.ndarray, state: Any) -> Context:
    """Of a prompt's last tokens, with the state before them."""
    seen = np.zeros(model.config.vocab_size, bool)
    seen[prompt] = True
    waiting = np.asarray(prompt[-PREFILL_CHUNKS[0] :], np.int32)
    return Context(state, waiting, seen, len(prompt))


def _device(params: Any) -> Sharding:
    """Where parameters are: on one device, all alike."""
    return jax.tree.leaves(params)[0].sharding


def _placed(tree: Any, sharding: Sharding) -> Any:
    """Shapes of the arrays of a tree, all with this sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
