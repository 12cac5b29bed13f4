"""Two or more GPUs of one host train as one does, with the Pallas kernels, and to the same bits.

A process of two that is killed costs nothing, whatever number of GPUs the run resumes on. That also
runs on simulated devices, with --thorough.
"""

import functools
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.compilation import compile_side_by_side
from gt_jax.config import default_config, from_config_dict
from gt_jax.data import make_batches
from gt_jax.kernels import choose_impl
from gt_jax.models import make_config, make_model
from gt_jax.training import backend, metrics, parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step
from tests.ports import free_port
from tests.training.nursery import Nursery

ROWS, LENGTH, STEPS = 8, 256, 4
# A token's loss is the end of some 20 results in a row that are rounded to bfloat16 (of two blocks:
# norms, projections, recurrences, fusion, feed-forward), each within 2^-9 of its size and either
# way: together sqrt(20) 2^-9, as much as a gradient's elements may differ by. A loss is a mean over
# tokens that are rounded independently.
ROUNDING = 20**0.5 * 2**-9
LOSS, NORM = ROUNDING / (ROWS * LENGTH) ** 0.5, ROUNDING

NOISE = 1e-4  # of a mean loss in float32, of products with tf32's 2^-11 on a GPU
KILLED = 8  # steps of a run that is killed in the middle
ARGUMENTS = [
    *("--config=tiny", "--config.model.preset=gf-mh", "--config.model.dim=128"),
    *("--config.model.layers=2", "--config.model.heads=2", "--config.model.state_size=64"),
    *("--config.model.dtype=float32", "--config.train.batch_size=8", "--config.train.seq_len=64"),
    *(f"--config.train.steps={KILLED}", "--config.train.eval_every=4"),
    *("--config.train.eval_tokens=600", "--config.train.sample_tokens=0", "--config.log.every=1"),
    *("--config.checkpoint.every=2", "--config.optim.warmup_steps=1"),
    *("--config.log.tensorboard=false", "--config.parallel.host_timeout=15"),
]

gpu = pytest.mark.gpu
several = pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs or more"
)


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


@gpu
@several
def test_kernels_are_those_of_the_gpu():
    assert all(choose_impl(op)[0] in ("mosaic", "portable") for op in ("wkv6", "ssd"))


@gpu
@several
@pytest.mark.parametrize("mode", ["data", "fsdp", "sequence"])
def test_several_gpus_train_like_one(trained, mode):
    (losses, norms, _), _ = trained[mode]
    (expected, expected_norms, _), _ = trained["one"]
    # What is compared is of parameters that move, by far more than may be wrong.
    assert expected[0] - expected[-1] > 20 * LOSS * expected[0]
    assert losses == pytest.approx(expected, rel=LOSS)
    assert norms == pytest.approx(expected_norms, rel=NORM)


@gpu
@several
@pytest.mark.parametrize("mode", ["one", "data", "fsdp", "sequence"])
def test_a_second_run_gives_the_same_bits(trained, mode):
    (losses, norms, params), (again, norms_again, params_again) = trained[mode]
    assert (losses, norms) == (again, norms_again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("platform", [pytest.param("cuda", marks=(gpu, several)), "cpu"])
def test_run_of_which_one_process_is_killed_resumes_on_any_number_of_devices(
    request, tmp_path, platform
):
    if platform == "cpu" and not request.config.getoption("--thorough"):
        pytest.skip("ends a run badly on simulated devices: --thorough")
    count = jax.device_count() if platform == "cuda" else 4
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    platforms = {"cpu": "cpu", "cuda": "cuda,cpu"}[platform]
    environment = {"JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    nursery = Nursery(tmp_path / "nursery", ARGUMENTS, **environment)
    kill = {"phase": "training", "signals": [signal.SIGKILL], "skip": KILLED // 2 + 1}

    def run_two(workdir, killed):
        """[(exit status, what it printed)] of two processes with a device each."""
        address = f"127.0.0.1:{free_port()}"
        pids = []
        for i in range(2):
            flags = {"coordinator_address": address, "num_processes": 2, "process_id": i, "fsdp": 2}
            flags = [f"--config.parallel.{name}={value}" for name, value in flags.items()]
            settings = kill if killed and i == 1 else {}
            pids.append(nursery.start(workdir, *flags, gpus=visible[i], **settings))
        return [nursery.end(pid=pid) for pid in pids]

    try:
        ended = run_two(tmp_path / "straight", killed=False)
        assert [status for status, _ in ended] == [0, 0], ended
        assert re.search(r"device: +2 x .+ on 2 processes", ended[0][1]), ended[0][1]
        ended = run_two(tmp_path / "killed", killed=True)
        assert [status for status, _ in ended] == [1, -signal.SIGKILL], ended
        assert "process 1 on" in ended[0][1] and "Traceback" not in ended[0][1], ended[0][1]
        saved = max(checkpoint.steps(tmp_path / "killed"))
        assert 2 <= saved < KILLED
        expected, whole = what_is_left(tmp_path / "straight")
        assert len(expected) == KILLED and np.ptp(expected) > 100 * NOISE * expected[0]
        for devices in sorted({1, min(count, 4)}):
            workdir = tmp_path / f"on{devices}"
            shutil.copytree(tmp_path / "killed", workdir)
            flags = [f"--config.parallel.fsdp={devices}"]
            gpus = ",".join(visible[:devices])
            status, printed = nursery.run(workdir, *flags, devices=devices, gpus=gpus)
            assert status == 0, printed
            losses, params = what_is_left(workdir)
            assert losses == pytest.approx(expected, rel=NOISE)
            for one, two in zip(params, whole, strict=True):
                assert np.linalg.norm(one - two) <= 10 * NOISE * np.linalg.norm(two)
            print(f"resumed from step {saved} on {devices} devices: {losses[-1]} of {expected[-1]}")
    finally:
        nursery.close()


def what_is_left(workdir):
    """Losses by step, and the parameters at the end."""
    rows = {row["step"]: row["loss"] for row in metrics.read(workdir) if "loss" in row}
    _, params = checkpoint.load(f"{workdir}@last")[:2]
    return [*rows.values()], [np.asarray(x) for x in jax.tree.leaves(params)]
