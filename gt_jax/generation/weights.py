"""Partial evaluation of a decode step: the part that depends on parameters alone runs once.

That part holds the casts to the computation dtype, the transpose of a tied head and the stacking of
matrices. It runs before the loop of steps and changes no value that a step computes with.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from gt_jax.models import LanguageModel, ModelConfig, Params, blocks, make_model


@functools.partial(jax.jit, static_argnames=("model", "rows"))
def prepare_weights(model: LanguageModel, params: Params, rows: int) -> list[jax.Array]:
    """The arrays that `decode_step` needs of the parameters, for batches of `rows`."""
    split = _split(model.config, rows)
    values = split.constants | dict(zip(split.params, jax.tree.leaves(params)))
    _run(split.of_params, values)
    return [values[variable] for variable in split.weights]


def decode_step(
    model: LanguageModel, weights: list[jax.Array], tokens: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """One token of every row.

    Args:
        weights: of `prepare_weights` for this model and number of rows.
        tokens: [B] int32.
        state: of the model.

    Returns:
        logits [B, vocab] float32, and the state after the tokens.
    """
    split = _split(model.config, len(tokens))
    values = dict(zip(split.weights, weights))
    values.update(zip(split.inputs, [tokens, *jax.tree.leaves(state)]))
    _run(split.rest, values)
    logits, *after = (values[variable] for variable in split.outputs)
    return logits, jax.tree.unflatten(jax.tree.structure(state), after)


class _Split(NamedTuple):
    """The equations of a step (those of parameters alone, and the rest) and variables by role."""

    of_params: list[Any]
    rest: list[Any]
    constants: dict[Any, Any]
    params: list[Any]
    inputs: list[Any]
    weights: list[Any]
    outputs: list[Any]


@functools.cache
def _split(config: ModelConfig, rows: int) -> _Split:
    # Without rematerialisation, which is for gradients and would hide the equations.
    model = make_model(dataclasses.replace(config, remat=ModelConfig.remat))

    def whole(params, tokens, state):
        logits, after = model.apply({"params": params}, tokens[:, None], state)
        return logits[:, 0], after

    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = jax.eval_shape(lambda: model.init_state(rows))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    with blocks.apart():
        closed = jax.make_jaxpr(whole)(params["params"], tokens, state)
    n = len(jax.tree.leaves(params))
    jaxpr, constants = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts))

    known, of_params, rest, read = {*constants, *jaxpr.invars[:n]}, [], [], []
    for equation in jaxpr.eqns:
        inputs = [x for x in equation.invars if not isinstance(x, Literal)]
        # A result larger than its inputs, such as a repeated bias, is cheaper to compute than read.
        grows = _bytes(equation.outvars) > _bytes(inputs)
        if known.issuperset(inputs) and not grows:
            of_params.append(equation)
            known.update(equation.outvars)
        else:
            rest.append(equation)
            read += inputs
    weights = [variable for variable in dict.fromkeys(read) if variable in known]
    params, inputs = jaxpr.invars[:n], jaxpr.invars[n:]
    return _Split(of_params, rest, constants, params, inputs, weights, jaxpr.outvars)


def _bytes(variables):
    return sum(x.aval.size * x.aval.dtype.itemsize for x in variables)


def _run(equations, values):
    """Evaluate equations of a jaxpr into `values`, variable -> array."""
    for equation in equations:
        inputs = [x.val if isinstance(x, Literal) else values[x] for x in equation.invars]
        options = equation.primitive.get_bind_params(equation.params)
        with jax.named_scope(str(equation.source_info.name_stack)):  # as profiles show it
            results = equation.primitive.bind(*inputs, **options)
        results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results))
