"""The residual stream's fused norm: right in the interpreter, lowered for every kind of GPU."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.analysis.health import measure_health
from gt_jax.kernels.elementwise import residual_norm
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models import hybrid, make_config, make_model, stream
from gt_jax.models.config import ModelConfig
from tests.kernels.hopper_kernels import too_old
from tests.kernels.runs import runs_of_kernels

pytestmark = too_old

WIDTH, EPSILON = 64, 1e-3


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Rows of threads that walk several tokens, the last of them beyond the end."""
    from gt_jax.kernels.elementwise import residual_norm_rows

    tuning = {key: z._replace(blocks=3) for key, z in residual_norm_rows.TUNING.items()}
    monkeypatch.setattr(residual_norm_rows, "TUNING", tuning)
    monkeypatch.setattr(stream, "LEAST_NUMBERS", 0)  # tests are small


def norm(u, scale):
    return u / jnp.sqrt(jnp.mean(u**2, axis=-1, keepdims=True) + EPSILON) * scale


def straight_gate(x, a, b, kernel, bias, scale):
    g = jax.nn.sigmoid(a @ kernel[:WIDTH] + b @ kernel[WIDTH:] + bias)[..., None]
    u = x + g * a + (1 - g) * b
    return u, norm(u, scale), g


def straight_blend(x, a, b, score, bias, scale):
    g = jax.nn.sigmoid(score + bias[0] - bias[1])
    u = x + g * a + (1 - g) * b
    return u, norm(u, scale), g


# name -> the fused function, and formulas in float64 that share nothing with it
FUNCTIONS = {
    "normed": (
        functools.partial(residual_norm.normed, EPSILON, 2),
        lambda x, scale: (x, [norm(x, scale)] * 2),
    ),
    "added": (
        functools.partial(residual_norm.added, EPSILON, 2),
        lambda x, branch, scale: (x + branch, [norm(x + branch, scale)] * 2),
    ),
    "gated": (functools.partial(residual_norm.gated, EPSILON), straight_gate),
    "blended": (functools.partial(residual_norm.blended, EPSILON), straight_blend),
}


def case(name, branch=jnp.bfloat16, tokens=(2, 5)):
    """Arguments and cotangents of a function."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    wide = functools.partial(draw, *tokens, WIDTH)
    scale = 1 + draw(WIDTH, dtype=jnp.float32) / 4
    arguments = {
        "normed": lambda: (),
        "added": lambda: (wide(dtype=branch),),
        "gated": lambda: (
            wide(dtype=branch),
            wide(dtype=branch),
            draw(2 * WIDTH, dtype=jnp.float32) / 8,
            draw(1, dtype=jnp.float32),
        ),
        "blended": lambda: (
            wide(dtype=branch),
            wide(dtype=branch),
            draw(*tokens, 1, dtype=jnp.float32),
            draw(2, dtype=jnp.float32),
        ),
    }[name]()
    of_norm = [wide(dtype=jnp.bfloat16) for _ in range(2)]
    cotangents = wide(dtype=jnp.float32), of_norm if name in ("normed", "added") else of_norm[0]
    if name in ("gated", "blended"):
        cotangents = *cotangents, draw(*tokens, 1, dtype=jnp.float32)
    return (wide(dtype=jnp.float32), *arguments, scale), cotangents


def with_gradients(function, arguments, cotangents):
    def run(arguments, cotangents):
        outputs, pull_back = jax.vjp(function, *arguments)
        return outputs, pull_back(cotangents)

    return jax.tree.leaves(jax.jit(run)(arguments, cotangents))


@pytest.mark.parametrize(
    "name, branch",
    [
        ("normed", None),
        ("added", "bfloat16"),
        ("added", "float32"),
        ("gated", "bfloat16"),
        ("blended", "bfloat16"),
    ],
)
def test_interpreted_kernels_match_straight_formulas_in_float64(
    float64_in_every_thread, name, branch
):
    fused, straight = FUNCTIONS[name]
    arrays = case(name, branch)
    with devices.simulated("interpret"):
        ours = with_gradients(fused, *arrays)
        again = with_gradients(fused, *arrays)
    wide = jax.tree.map(lambda z: z.astype(jnp.float64), arrays)
    for z, repeated, expected in zip(ours, again, with_gradients(straight, *wide), strict=True):
        np.testing.assert_array_equal(z, repeated)
        error = np.sqrt(np.mean((np.asarray(z, np.float64) - expected) ** 2))
        bound = 3e-3 if z.dtype == jnp.bfloat16 else 5e-6  # of rounding to 8 or 24 bits
        assert error <= bound * np.sqrt(np.mean(np.square(expected)))


def test_models_under_vmap_each_take_their_own_weights():
    fused, _ = FUNCTIONS["gated"]
    arguments, _ = case("gated", tokens=(1, 3))
    two = jax.tree.map(lambda z: jnp.stack([z, z[..., ::-1]]), arguments)
    with devices.simulated("interpret"):
        together = jax.jit(jax.vmap(fused))(*two)
        alone = [jax.jit(fused)(*(z[n] for z in two)) for n in range(2)]
    for z, expected in zip(together, zip(*alone), strict=True):
        np.testing.assert_array_equal(z, jnp.stack(expected))


class Stream(nn.Module):
    """Two norms of a stream, as blocks take them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, branch):
        x, norms = stream.normed(self.config, "mixer_norm", x, readers=2)
        return *norms, *stream.add_and_norm(self.config, "ffn_norm", x, branch)


@pytest.fixture
def float32_parameters():
    """As models draw them for users."""
    with jax.enable_x64(False):
        yield


def test_a_stream_is_the_same_with_kernels_and_without(float32_parameters):
    (x, branch, _), _ = case("added")
    make = lambda impl: Stream(
        make_config("gf", vocab_size=8, dim=WIDTH, heads=1, dtype="bfloat16", impl=impl)
    )
    params = make("chunked").init(jax.random.key(0), x, branch)
    expected = jax.jit(make("chunked").apply)(params, x, branch)
    with devices.simulated("interpret"):
        found = jax.jit(make("auto").apply)(params, x, branch)
    for z, other in zip(found, expected, strict=True):
        assert z.dtype == other.dtype
        rounding = 2**-7 if z.dtype == jnp.bfloat16 else 1e-6
        z, other = (np.asarray(array, np.float32) for array in (z, other))
        np.testing.assert_allclose(z, other, rtol=rounding)


def test_kernels_take_the_stream_of_a_large_step_alone(monkeypatch):
    config = make_config("gf-mh", vocab_size=65, dtype="bfloat16")
    takes = lambda rows, length: stream.takes_kernels(
        config, jax.ShapeDtypeStruct((rows, length, config.dim), jnp.float32)
    )
    monkeypatch.undo()
    with devices.simulated("lower"):
        assert takes(8, 2048) and not takes(64, 64) and not takes(2**20, 1)


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize("capability, branch", [((8, 0), "bfloat16"), ((12, 0), "float32")])
def test_kernels_lower_for_gpus_that_are_not_there(capability, branch):
    jax.clear_caches()
    for name, (fused, _) in FUNCTIONS.items():
        arrays = case(name, "bfloat16" if name in ("gated", "blended") else branch)
        with devices.simulated("lower"), lowered_for(capability):
            traced = jax.jit(lambda *z, fused=fused: with_gradients(fused, *z)).trace(*arrays)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for direction in ("forward", "backward"):
            assert f"residual_norm_{direction}_mosaic_gpu" in text, name


def test_dots_keeps_the_norms_that_full_computes_again(float32_parameters):
    def forward_passes(remat):
        sizes = {"vocab_size": 8, "dim": 64, "heads": 1, "state_size": 64, "layers": 1}
        config = make_config("gf", **sizes, dtype="bfloat16", impl="portable", remat=remat)
        model, tokens = make_model(config), jnp.zeros((1, 64), jnp.int32)
        loss = lambda params: model.apply({"params": params}, tokens, tokens, method="loss").nats
        with devices.simulated("lower"):
            params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
            gradient = jax.make_jaxpr(jax.grad(loss))(params)
        return runs_of_kernels(gradient)["residual_norm_forward"]

    none, dots, full = (forward_passes(remat) for remat in ("none", "dots", "full"))
    assert 0 < none == dots < full


def test_kernels_take_streams_and_branches_that_they_are_for():
    config = make_config("gf", vocab_size=8, dim=WIDTH, heads=1, dtype="bfloat16")
    change = functools.partial(dataclasses.replace, config)
    zeros = lambda tokens, width, dtype="float32": jnp.zeros((1, tokens, width), dtype)
    x, branch = zeros(2, WIDTH), zeros(2, WIDTH, "bfloat16")
    with devices.simulated("lower"):
        takes = functools.partial(stream.takes_kernels, config)
        assert takes(x) and takes(zeros(2, 160)) and takes(x, is_gated=True)
        assert not takes(zeros(1, WIDTH)), "a single token"
        assert not takes(zeros(2, 100)) and not takes(zeros(2, 160), is_gated=True)
        assert not takes(branch), "a stream in bfloat16"
        assert not stream.takes_kernels(change(impl="chunked"), x)
        joins = hybrid._joins_in_kernel
        assert joins(config, x, branch, branch)
        assert not joins(change(post_norm=True), x, branch, branch)
        assert not joins(change(feed_forward=False), x, branch, branch)
        assert not joins(config, x, x, branch)
        for dtype in ("bfloat16", "float32", "float16"):  # the last is added without a kernel
            apply = functools.partial(Stream(config).init_with_output, jax.random.key(0), x)
            jaxpr = jax.make_jaxpr(apply)(zeros(2, WIDTH, dtype))
            assert runs_of_kernels(jaxpr)["residual_norm_forward"] == 2, dtype


@pytest.mark.parametrize(
    "width, dtype, reason",
    [
        (64, "float32", "is for bfloat16; this is float32"),
        (100, "bfloat16", "is not for 100 channels"),
        (8192, "bfloat16", "is not for 8192 channels"),
    ],
)
def test_what_the_norm_does_not_take_is_named(width, dtype, reason):
    with devices.simulated("lower"):
        assert reason in residual_norm.unsupported(width, dtype)
        assert residual_norm.unsupported(64, "bfloat16", is_gated=True) is None


def test_blocks_leave_their_sum_to_the_next_norm_and_record_it_as_without_kernels(
    float32_parameters,
):
    """It records arrays of the same shapes; values are those of the functions above."""
    sizes = {"vocab_size": 8, "dim": 64, "heads": 1, "state_size": 64, "layers": 2}
    make = lambda impl: make_model(make_config("ws", **sizes, dtype="bfloat16", impl=impl))
    model, tokens = make("chunked"), jnp.zeros((1, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def recorded(impl):
        apply = lambda params: make(impl).apply(
            {"params": params}, tokens, tokens, method="loss", mutable=["activations"]
        )
        with devices.simulated("lower"):
            jaxpr = jax.make_jaxpr(apply)(params)
            _, sown = jax.eval_shape(apply, params)
        return sown["activations"], runs_of_kernels(jaxpr)["residual_norm_forward"]

    (with_kernels, count), (without, none) = recorded("portable"), recorded("chunked")
    assert (count, none) == (2 * sizes["layers"], 0)
    assert jax.tree.map(jnp.shape, with_kernels) == jax.tree.map(jnp.shape, without)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_who_looks_into_blocks_sees_arrays(remat, float32_parameters):
    """Captured or intercepted, a block is given and gives the stream, not a sum that is to come."""
    sizes = {"vocab_size": 8, "dim": 64, "heads": 1, "state_size": 64, "layers": 2}
    config = make_config("gf", **sizes, dtype="bfloat16", impl="portable", remat=remat)
    model, tokens = make_model(config), jnp.zeros((1, 64), jnp.int32)
    shapes, seen = ((1, 64, 64),) * sizes["layers"], []

    def look(call, args, kwargs, context):
        if type(context.module).__name__.endswith("Block") and context.method_name == "__call__":
            seen.append(args[0].shape)
        return call(*args, **kwargs)

    with devices.simulated("lower"):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        health = jax.eval_shape(functools.partial(measure_health, model), params, tokens)
        assert health["stream_variance"].shape == (sizes["layers"],)
        with nn.intercept_methods(look):
            jax.eval_shape(model.apply, {"params": params}, tokens)
    assert tuple(seen) == shapes


def test_what_full_keeps_of_a_block_is_the_stream_and_no_sum(float32_parameters):
    x = jnp.zeros((1, 64, 64))
    of = lambda remat: make_config(
        "gf", vocab_size=8, dim=64, heads=1, dtype="bfloat16", remat=remat
    )
    with devices.simulated("lower"):
        assert isinstance(stream.begin(of("dots"), x), stream.Sum)
        assert stream.begin(of("full"), x) is x
