"""Two or more GPUs of one host train as one does, with the Pallas kernels, and to the same bits."""

import functools

import jax
import numpy as np
import pytest

from gt_jax.compilation import compile_side_by_side
from gt_jax.config import default_config, from_config_dict
from gt_jax.data import make_batches
from gt_jax.kernels import choose_impl
from gt_jax.models import make_config, make_model
from gt_jax.training import backend, parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step

ROWS, LENGTH, STEPS = 8, 256, 4
# A token's loss is the end of some 20 results in a row that are rounded to bfloat16 (of two blocks:
# norms, projections, recurrences, fusion, feed-forward), each within 2^-9 of its size and either
# way: together sqrt(20) 2^-9, as much as a gradient's elements may differ by. A loss is a mean over
# tokens that are rounded independently.
ROUNDING = 20**0.5 * 2**-9
LOSS, NORM = ROUNDING / (ROWS * LENGTH) ** 0.5, ROUNDING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs or more"
    ),
]


def settings():
    """Mode -> (devices, axes of the mesh)."""
    devices = jax.devices()
    modes = {"one": (devices[:1], {}), "data": (devices, {})}
    return modes | {name: (devices, {name: len(devices)}) for name in ("fsdp", "sequence")}


@pytest.fixture(scope="module")
def trained():
    """Mode -> of each of two runs: losses, gradient norms, parameters at the end."""
    backend.prepare()
    fields = {"train.batch_size": ROWS, "train.seq_len": LENGTH, "optim.warmup_steps": 1}
    # A rate at which the loss falls from the first step on: at larger ones it doubles first, and
    # every rounding with it.
    fields["optim.lr"] = 1e-4
    config = default_config()
    config.update_from_flattened_dict(fields)
    config = from_config_dict(config)
    sizes = {"dim": 512, "layers": 2, "heads": 8, "state_size": 128}
    model = make_model(make_config("gf-mh", vocab_size=512, dtype="bfloat16", **sizes))
    schedule = make_schedule(config.optim, 20)
    tx = make_optimizer(config.optim, schedule)
    init = functools.partial(init_state, model, tx, config)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    tokens = np.random.default_rng(0).zipf(1.5, 20_000).astype(np.int32) % 512
    read = functools.partial(
        make_batches, [tokens], order="windows", batch_size=ROWS, seq_len=LENGTH
    )
    meshes, programs = {}, {}
    for name, (devices, axes) in settings().items():
        mesh = meshes[name] = parallel.make_mesh(**axes, devices=devices)
        sharding, batch = parallel.state_sharding(mesh, shapes), next(read())
        arguments = (
            parallel.shapes_on(sharding, shapes),
            parallel.shapes_on(parallel.batch_shardings(batch, mesh), batch),
        )
        step = parallel.compile_train_step(make_step, mesh, "jit", shapes, activation=2**30)
        programs[name] = functools.partial(step.lower, *arguments)
    first = jax.device_get(jax.jit(init)(jax.random.key(0)))
    ready = {name: made.result() for name, made in compile_side_by_side(programs).items()}

    def train(name):
        mesh, batches = meshes[name], read()
        state = jax.device_put(first, parallel.state_sharding(mesh, shapes))
        rows = []
        for _ in range(STEPS):
            state, metrics = ready[name](state, parallel.put_batch(next(batches), mesh))
            rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        losses, norms = zip(*rows)
        return losses, norms, jax.device_get(state.params)

    return {name: (train(name), train(name)) for name in programs}


def test_kernels_are_those_of_the_gpu():
    assert all(choose_impl(op)[0] in ("mosaic", "portable") for op in ("wkv6", "ssd"))


@pytest.mark.parametrize("mode", ["data", "fsdp", "sequence"])
def test_several_gpus_train_like_one(trained, mode):
    (losses, norms, _), _ = trained[mode]
    (expected, expected_norms, _), _ = trained["one"]
    # What is compared is of parameters that move, by far more than may be wrong.
    assert expected[0] - expected[-1] > 20 * LOSS * expected[0]
    assert losses == pytest.approx(expected, rel=LOSS)
    assert norms == pytest.approx(expected_norms, rel=NORM)


@pytest.mark.parametrize("mode", ["one", "data", "fsdp", "sequence"])
def test_a_second_run_gives_the_same_bits(trained, mode):
    (losses, norms, params), (again, norms_again, params_again) = trained[mode]
    assert (losses, norms) == (again, norms_again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
