"""Kernels that are told of while the program around them is lowered."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

from gt_jax import kernel_programs
from gt_jax.kernels.pallas import devices, early, launch
from gt_jax.models import make_config, make_model
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old

# Kernels of gf_mh that write into an array they are given, which are not told of.
UPDATING = {"mosaic": 1, "portable": 3}


@pytest.fixture(autouse=True)
def without_tracebacks():
    """As `compilation.use_cache` sets it: a kernel is the same wherever it is traced."""
    before = jax.config.jax_include_full_tracebacks_in_locations
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    yield
    jax.config.update("jax_include_full_tracebacks_in_locations", before)


def make_loss(impl):
    """A function (parameters, tokens) -> loss, one that makes parameters, shapes of arguments."""
    sizes = {"vocab_size": 65, "layers": 2, "remat": "dots"}
    model = make_model(make_config("gf-mh", dtype="bfloat16", impl=impl, **sizes))

    def loss(params, tokens):
        return model.apply({"params": params}, tokens, tokens, method="loss").nats.sum()

    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    shapes = jax.eval_shape(init), jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return loss, init, shapes


def lower(function, shapes, tell=None):
    with early.telling(tell) if tell else contextlib.nullcontext():
        jitted = jax.jit(lambda *z: function(*z))  # which nothing was traced for
        return jitted.trace(*shapes).lower(lowering_platforms=("cuda",))


def kernels(lowered):
    return {kernel.hash for kernel in kernel_programs.of_program(lowered)}


def test_a_step_holds_the_same_kernels_and_tells_of_each_once():
    """Those of an evaluation are among them, or it would compile them again."""
    told = []
    with devices.simulated("lower"):
        loss, _, shapes = make_loss("mosaic")
        step = jax.value_and_grad(loss)
        plain = kernels(lower(step, shapes))
        found = lower(step, shapes, lambda call: told.append(kernel_programs.of_call(call).hash))
        found, of_evaluation = kernels(found), kernels(lower(loss, shapes))
    assert len(told) == len(set(told)) == len(plain) - UPDATING["mosaic"]
    assert set(told) < found and found == plain
    assert len(of_evaluation - found) == 2  # recurrences that keep nothing for gradients


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX 0.12 hashes no number")
def test_a_kernel_has_no_number_and_is_else_what_jax_makes(monkeypatch):
    """The texts are what MLIR prints of the kernels, with JAX's names and with ours."""
    texts = []
    for numbered in (False, True):
        monkeypatch.setattr(launch, "_NUMBERED", numbered)
        jax.clear_caches()
        with devices.simulated("lower"):
            loss, _, shapes = make_loss("mosaic")
            lowered = lower(loss, shapes)
        texts.append([])
        with lowered.compiler_ir().context as context:
            context.allow_unregistered_dialects = True
            for call in kernel_programs._calls(lowered):
                config = {
                    entry.name: entry.attr for entry in call.attributes["mhlo.backend_config"]
                }
                if "module" in config:
                    texts[-1].append(str(ir.Module.parse(config["module"].value_bytes)))
    name = re.compile(r'(mosaic_gpu.dump_basename = "[a-z_0-9]*[a-z])(_\d+)?"')
    assert all(name.search(text)[2] for text in texts[0])
    assert not any(name.search(text)[2] for text in texts[1])
    ours, theirs = ([name.sub(r'\1"', text) for text in of] for of in texts)
    assert len(ours) == 7 and ours == theirs


def test_kernels_under_vmap_are_as_many():
    with devices.simulated("lower"):
        loss, _, shapes = make_loss("mosaic")
        several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes)
        plain = kernels(lower(jax.vmap(loss), several))
        assert len(kernels(lower(jax.vmap(loss), several, lambda call: None))) == len(plain)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", UPDATING)
def test_a_step_that_tells_of_its_kernels_has_the_same_bits(impl):
    if reason := devices.portable_unsupported():
        pytest.skip(reason)
    loss, init, shapes = make_loss(impl)
    params = jax.jit(init)()
    tokens = jnp.asarray(np.random.default_rng(0).integers(65, size=shapes[1].shape), jnp.int32)
    told = []
    for tell in (None, told.append):
        compiled = lower(jax.value_and_grad(loss), shapes, tell).compile()
        found = compiled(params, tokens)
        if tell is None:
            expected = found
    assert told
    jax.tree.map(np.testing.assert_array_equal, found, expected)
