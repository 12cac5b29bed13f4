"""A sample by programs compiled before there are parameters: the tokens of `generate`."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gt_jax import compilation
from gt_jax.errors import InputError
from gt_jax.generation import ahead, generate, lower_ahead, prefill, sample, slots
from gt_jax.models import make_model
from gt_jax.training.parallel import make_mesh
from tests.models.small_models import small_model

_heard, _events = set(), []  # threads that are listened to


@pytest.fixture(scope="module", autouse=True)
def listener():
    """Collects what JAX traces, lowers and compiles in threads, and for how long.

    Others may still compile for a test that is over.
    """

    def on_event(event: str, duration_secs: float, **about: str | int) -> None:
        if threading.get_ident() in _heard:
            _events.append((event, about.get("fun_name"), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(on_event)


@pytest.mark.parametrize("kind, length", [("gf", 5), ("rwkv6", 5), ("gpt2", 5), ("gf", 70)])
def test_a_sample_traces_and_compiles_nothing_that_was_compiled_ahead(kind, length):
    # A field of its own makes the model one that no other test has sampled from.
    config = dataclasses.replace(small_model(kind).model.config, vocab_size=23)
    model, everywhere = make_model(config), NamedSharding(make_mesh(), P())
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens)["params"], out_shardings=everywhere)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    shapes = jax.tree.map(placed, jax.eval_shape(init, key))
    prompt = np.arange(length, dtype=np.int32) % 23
    programs = {}

    def compile_ahead():
        for name, lower in lower_ahead(model, prompt).items():
            programs[name] = lower(shapes).compile()

    thread = threading.Thread(target=compile_ahead)
    thread.start()
    thread.join()
    params = init(key)
    if length > 64:
        prefill(model, params, prompt)
    _events.clear()
    _heard.add(threading.get_ident())
    try:
        drawn = list(sample(model, params, prompt, programs=programs, max_tokens=35, seed=3))
    finally:
        _heard.clear()
    assert _events == []
    assert len(drawn) == 35
    assert drawn == list(generate(model, params, prompt, max_tokens=35, seed=3))


def test_nothing_is_tried_out_on_a_gpu_to_compile_a_sample(monkeypatch):
    """It takes seconds more than the sample; what is served may be for hours, and is tried out."""
    asked, compilers = [], (ahead._begin, slots._advance)
    monkeypatch.setattr(compilation, "options", asked.append)
    try:
        for compiler in compilers:
            compiler.cache_clear()
        ahead._begin()
        slots._advance(sample=True)
        assert all(compilation.UNTIMED.items() <= options.items() for options in asked)
        slots._advance()
        assert len(asked) == 3 and asked[-1] == compilation.DECODING
    finally:
        for compiler in compilers:
            compiler.cache_clear()


def test_a_sample_refuses_what_generate_refuses():
    model = small_model("gpt2").model
    limit = model.config.position_limit
    with pytest.raises(InputError, match=f"exceeds the {limit} positions"):
        sample(model, None, np.arange(3), programs={}, max_tokens=limit)
