import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError

from gt_jax.models import blocks, count_parameters, hybrid
from tests.models.small_models import jit, random_tokens, small_model

LAYERS = 3
SEGMENTS = jnp.array([[0] * 3 + [1] * 2, [2] * 5])


def model_of(kind, **fields):
    return small_model(kind, layers=LAYERS, impl="chunked", **fields)[:2]


def applied(model, params, tokens, state=None, **options):
    """Loss, outputs, what blocks record, and gradients."""

    def loss(params):
        output, recorded = model.apply(
            {"params": params}, tokens, state, mutable=["activations"], **options
        )
        return jnp.mean(jax.nn.log_softmax(output.logits)[..., 0]), (output, recorded)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture
def calls(monkeypatch):
    """The layers of hybrid blocks that are traced, in order."""
    traced, call = [], hybrid.Block.__call__

    def counted(block, *inputs):
        traced.append(block.layer)
        return call(block, *inputs)

    monkeypatch.setattr(hybrid.Block, "__call__", counted)
    return traced


def test_equal_blocks_are_traced_once(calls):
    model, params = model_of("gf")
    calls.clear()
    traced = jax.jit(functools.partial(applied, model)).trace(params, random_tokens(2, 9))
    assert calls == [0]
    text = traced.lower().as_text()
    functions, uses = (
        re.findall(rf"{word} @(one_block\w*)\(", text) for word in ("private", "call")
    )
    assert len(functions) == 2, "one for the forward pass, one for gradients"
    assert collections.Counter(uses) == dict.fromkeys(functions, LAYERS)


@pytest.mark.parametrize(("kind", "remat"), [("gf", "dots"), ("rwkv6", "none")])
def test_shared_blocks_compute_what_blocks_apart_do(kind, remat):
    model, params, _ = small_model(kind, remat=remat)
    state = jax.tree.map(lambda x: x + 0.1, model.init_state(2))
    inputs = params, random_tokens(2, 5), state
    run = lambda *inputs: applied(model, *inputs, segment_ids=SEGMENTS)
    shared = jit(run)(*inputs)
    with blocks.apart():
        separate = jit(lambda *inputs: run(*inputs))(*inputs)
    assert jax.tree.structure(shared) == jax.tree.structure(separate)
    jax.tree.map(np.testing.assert_array_equal, shared, separate)


@pytest.mark.parametrize("kind", ["gf", "rwkv6", "gpt2"])
def test_shapes_of_few_blocks_stand_for_all(kind):
    model, params = model_of(kind)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert count_parameters(model.config)["total"] == sum(sizes)
    state = jax.eval_shape(model.init_with_output, jax.random.key(0), random_tokens(2, 1))[0].state
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(model.init_state(2)) == shapes(state)


def test_blocks_that_draw_random_numbers_draw_each_their_own(calls):
    model, params = model_of("gf")
    calls.clear()
    rngs = {"dropout": jax.random.key(0)}
    run = functools.partial(applied, model, rwkv_drop=0.5, rngs=rngs)
    jax.eval_shape(run, params, random_tokens(2, 9))
    assert calls == list(range(LAYERS))
    calls.clear()
    jax.eval_shape(functools.partial(applied, model, rngs=rngs), params, random_tokens(2, 9))
    assert calls == [0], "a key alone tells no block apart"


def test_every_block_is_seen_by_who_looks_into_blocks():
    model, params = model_of("gf")
    tokens = random_tokens(2, 9)
    apply = functools.partial(model.apply, {"params": params}, tokens)
    names = {f"blocks_{layer}" for layer in range(LAYERS)}

    captured = jax.eval_shape(lambda: apply(capture_intermediates=True, mutable=["intermediates"]))
    assert names <= captured[1]["intermediates"].keys()

    seen = set()

    def look(call, args, kwargs, context):
        seen.add(context.module.path[:1])
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(apply)
    assert {(name,) for name in names} <= seen

    _, before = jax.eval_shape(lambda: apply(mutable=["activations"]))

    def again(before):
        return model.apply({"params": params, **before}, tokens, mutable=["activations"])[1]

    recorded = jax.eval_shape(again, before)["activations"]
    assert [len(recorded[name]["fusion"]["gate"]) for name in sorted(names)] == [2] * LAYERS


def test_op_by_op_blocks_are_not_compiled_at_every_call():
    found = []

    def note(x):
        found.append(blocks._is_staged())
        return x

    two, inside = jnp.ones(2), jax.vmap(jax.grad(note))
    for eager, x in (
        (note, 1.0),
        (jax.grad(note), 1.0),
        (jax.vmap(note), two),
        (inside, two),
        (jax.grad(lambda x: jnp.sum(inside(x))), two),
    ):
        eager(x)
    assert not any(found)
    found.clear()
    for program in (note, jax.grad(note)):
        jax.eval_shape(program, 1.0)
    jax.jit(inside)(two)
    jax.vmap(jax.jit(note))(two)
    assert all(found) and len(found) == 4


def test_parameters_of_a_block_that_are_missing_are_named():
    model, params = model_of("gf")
    params = {name: leaf for name, leaf in params.items() if name != "blocks_1"}
    with pytest.raises(ScopeParamNotFoundError, match="blocks_1"):
        jax.eval_shape(model.apply, {"params": params}, random_tokens(2, 9))
