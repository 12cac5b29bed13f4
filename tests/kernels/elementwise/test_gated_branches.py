"""Two normalised branches, gated or side by side: right in the interpreter, lowered for GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import gated_branches, normed_pair, weighted_norms
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models import FUSIONS, make_config, stream
from tests.kernels.hopper_kernels import too_old
from tests.models.small_models import lively_parameters

pytestmark = too_old

WIDTH, EPSILON = 64, 1e-2


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Rows of threads that walk several tokens, the last of them beyond the end."""
    from gt_jax.kernels.elementwise import residual_norm_rows

    tuning = {key: z._replace(blocks=3) for key, z in residual_norm_rows.TUNING.items()}
    monkeypatch.setattr(residual_norm_rows, "TUNING", tuning)
    monkeypatch.setattr(stream, "LEAST_NUMBERS", 0)  # tests are small


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def straight_sum(a, b, scores, biases, scales):
    z_a, z_b = jnp.split(scores, 2, axis=-1)
    gate_a, gate_b = jax.nn.sigmoid(z_a + biases[0]), jax.nn.sigmoid(z_b + biases[1])
    return gate_a * norm(a, scales[0]) + gate_b * norm(b, scales[1])


def straight_blend(a, b, scores, scales, head, bias):
    c = straight_sum(a, b, scores, (0, 0), scales)
    w = jax.nn.sigmoid(c @ head + bias[0] - bias[1])[..., None]
    return w * a + (1 - w) * b, w


def straight_pair(a, b, scales):
    return a, b, jnp.concatenate([norm(a, scales[0]), norm(b, scales[1])], axis=-1)


def straight_weights(a, b, n, scales, head, bias):
    w = jax.nn.sigmoid(n @ head + bias[0] - bias[1])[..., None]
    return n, w * norm(a, scales[0]) + (1 - w) * norm(b, scales[1]), w


# name -> the fused function, and formulas in float64 that share nothing with it
FUNCTIONS = {
    "gated_sum": (functools.partial(gated_branches.gated_sum, EPSILON), straight_sum),
    "gated_blend": (functools.partial(gated_branches.gated_blend, EPSILON), straight_blend),
    "normed_pair": (functools.partial(normed_pair.normed_pair, EPSILON), straight_pair),
    "weighted_norms": (
        functools.partial(weighted_norms.weighted_norms, EPSILON),
        straight_weights,
    ),
}


def case(name, tokens=(2, 5)):
    """Arguments and cotangents of a function."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)
    wide = lambda n: draw(*tokens, n * WIDTH, dtype=jnp.bfloat16)
    pair = lambda: (draw(WIDTH), draw(WIDTH))
    scales = tuple(1 + z / 4 for z in pair())
    arguments, cotangents = {
        "gated_sum": lambda: ((wide(2), pair(), scales), wide(1)),
        "gated_blend": lambda: (
            (wide(2), scales, draw(WIDTH) / 4, draw(2)),
            (wide(1), draw(*tokens, 1)),
        ),
        "normed_pair": lambda: ((scales,), (wide(1), wide(1), wide(2))),
        "weighted_norms": lambda: (
            (wide(1), scales, draw(WIDTH) / 4, draw(2)),
            (wide(1), wide(1), draw(*tokens, 1)),
        ),
    }[name]()
    return (wide(1), wide(1), *arguments), cotangents


def with_gradients(function, arguments, cotangents):
    def run(arguments, cotangents):
        outputs, pull_back = jax.vjp(function, *arguments)
        return outputs, pull_back(cotangents)

    return jax.tree.leaves(jax.jit(run)(arguments, cotangents))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_interpreted_kernels_match_straight_formulas_in_float64(float64_in_every_thread, name):
    fused, straight = FUNCTIONS[name]
    arrays = case(name)
    with devices.simulated("interpret"):
        ours = with_gradients(fused, *arrays)
        again = with_gradients(fused, *arrays)
    wide = jax.tree.map(lambda z: z.astype(jnp.float64), arrays)
    rms, size = lambda z: np.sqrt(np.mean(np.square(z))), 0.0
    for z, repeated, expected in zip(ours, again, with_gradients(straight, *wide), strict=True):
        np.testing.assert_array_equal(z, repeated)
        # Two numbers are the gradient of a bias: it may cancel, of terms like the head's before.
        size = rms(expected) if expected.size > 2 else max(size, rms(expected))
        bound = 3e-3 if z.dtype == jnp.bfloat16 else 5e-6  # of rounding to 8 or 24 bits
        assert rms(np.asarray(z, np.float64) - expected) <= bound * size


def test_models_under_vmap_each_take_their_own_weights():
    fused, _ = FUNCTIONS["gated_blend"]
    arguments, _ = case("gated_blend", tokens=(1, 3))
    two = jax.tree.map(lambda z: jnp.stack([z, z[..., ::-1]]), arguments)
    with devices.simulated("interpret"):
        together = jax.jit(jax.vmap(fused))(*two)
        alone = [jax.jit(fused)(*jax.tree.map(lambda z, n=n: z[n], two)) for n in range(2)]
    for z, expected in zip(together, zip(*alone), strict=True):
        np.testing.assert_array_equal(z, jnp.stack(expected))


@pytest.mark.parametrize("name", ["glu", "parallel", "mingru", "pscan"])
def test_fusions_are_the_same_with_kernels_and_without(name):
    with jax.enable_x64(False):
        make = lambda impl: FUSIONS[name](
            make_config(name, vocab_size=8, dim=WIDTH, heads=1, dtype="bfloat16", impl=impl)
        )
        rwkv, mamba, n = jax.random.normal(jax.random.key(0), (3, 2, 12, WIDTH), jnp.bfloat16)
        ids = jnp.asarray(np.arange(12) // 5)[None].repeat(2, axis=0)
        params = lively_parameters(make("chunked"), rwkv, mamba)

        def run(impl):
            def apply(params):
                module = make(impl)
                more = {"block_input": n} if getattr(module, "reads_input", False) else {}
                apply = functools.partial(module.apply, mutable=["activations"])
                (fused, _), seen = apply({"params": params}, rwkv, mamba, None, ids, **more)
                return fused, seen["activations"]

            return jax.tree.leaves(jax.jit(apply)(params))

        expected = run("chunked")
        with devices.simulated("interpret"):
            found = run("auto")
    for z, other in zip(found, expected, strict=True):
        z, other = np.asarray(z, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(z, other, rtol=2**-6, atol=2**-7 * np.abs(other).max())


# .ci/cross_compile.py compiles for all of them.
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_kernels_lower_for_gpus_that_are_not_there(capability):
    jax.clear_caches()
    for name, (fused, _) in FUNCTIONS.items():
        arrays = case(name)
        with devices.simulated("lower"), lowered_for(capability):
            traced = jax.jit(lambda *z, fused=fused: with_gradients(fused, *z)).trace(*arrays)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for direction in ("forward", "backward"):
            kernel = "gated_branches" if name.startswith("gated") else name
            assert f"{kernel}_{direction}_mosaic_gpu" in text, name
