import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gt_jax.compilation import compile_side_by_side
from gt_jax.kernels.pallas import devices
from gt_jax.models import make_config as make_model_config
from gt_jax.models import make_model, stream
from gt_jax.training import parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_eval_step, make_train_step

# Devices -> modes; 4 of them also share what needs whole rows or matrices.
MODES = {
    4: ["jit", "pmap", "4 fsdp", "2 sequence", "2 fsdp 2 sequence", "muon 2 fsdp 2 sequence"],
    8: ["jit", "pmap", "8 fsdp", "2 sequence", "2 fsdp 2 sequence"],
}


# One test for all modes of as many devices, so that one worker alone trains in them.
@pytest.mark.parametrize("count", MODES)
def test_devices_train_and_evaluate_like_one(count):
    """With carried state, accumulation, branch dropout and every auxiliary loss; and with Muon.

    Only the order of sums differs.
    """
    results = trained(count, *MODES[count], *(["balance"] if count == 4 else []))
    for mode in MODES[count]:
        rows, sums = results[mode]
        alone = results["muon" if mode.startswith("muon") else ""]
        for several, one in zip(rows, alone, strict=True):
            assert several.keys() == one.keys()
            for name in one:
                # A gate that is constant has a deviation of rounding alone.
                rounding = {"abs": 1e-6} if name == "gate_std" else {}
                same = pytest.approx(one[name], rel=1e-4, **rounding)
                assert several[name] == same, (mode, name)
        if alone is results[""]:
            assert sums == pytest.approx(results["jit"][1], rel=1e-4), mode
    assert results["pmap"][1] == pytest.approx(results["jit"][1], rel=1e-5)
    if "balance" in results:  # of whole rows, where devices share them
        (value, slope), (expected, expected_slope) = results["balance"]
        assert value == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-6)


def trained(count, *modes):
    """What tests.training.spread measured on simulated devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.spread", *modes],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_programs_compiled_ahead_compute_what_jit_does(toy, make_config, make_batch):
    config = make_config(**{"train.carry_state": True, "data.order": "tracks"})
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    mesh = parallel.make_mesh()
    make_state = jax.jit(
        lambda seed: init_state(toy, tx, config, jax.random.key(seed)),
        out_shardings=parallel.state_sharding(mesh),
    )
    make_step = functools.partial(make_train_step, toy, tx, schedule, config)
    step = parallel.compile_train_step(make_step, mesh, "jit", activation=2**16)
    measure = make_eval_step(toy)
    batch, carry = make_batch(0), toy.init_state(8)
    lower = parallel.lower_programs(make_state, step, measure, mesh, (batch, batch), carry, {})
    ready = {name: program.result() for name, program in compile_side_by_side(lower).items()}
    assert list(ready) == ["train", "init", "evaluate"]  # in the order they are needed

    put, seed = functools.partial(parallel.put_batch, mesh=mesh), np.uint32(3)
    expected = parallel.compile_eval_step(measure, mesh)(make_state(seed).params, batch, carry)
    found = ready["evaluate"](ready["init"](seed).params, put(batch), carry)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found, expected = (run(make_state(seed), put(batch)) for run in (ready["train"], step))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.skipif(
    jax.__version_info__ < devices.OLDEST_JAX, reason="the Pallas kernels need a newer JAX"
)
def test_a_lone_device_traces_a_block_once_forward_and_once_backward(
    make_config, make_batch, monkeypatch
):
    """What kernels return lies on no mesh: with parameters on one, a block was unlike others."""
    monkeypatch.setattr(stream, "LEAST_NUMBERS", 0)  # as for a large step
    sizes = {"dim": 64, "heads": 1, "state_size": 64, "layers": 3, "dtype": "bfloat16"}
    model = make_model(make_model_config("gf", vocab_size=11, impl="mosaic", **sizes))
    config, mesh, found = make_config(), parallel.make_mesh(), []
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    make_state = jax.jit(lambda seed: init_state(model, tx, config, jax.random.key(seed)))
    batch, none = make_batch(0, 2, 64), lambda *_: None

    class Traced:
        """A jitted step that is traced where it would be lowered."""

        lower = staticmethod(
            lambda *shapes: parallel.compile_train_step(
                make_step, mesh, "jit", activation=2**13
            ).trace(*shapes)
        )

    with devices.simulated("lower"):
        programs = parallel.lower_programs(make_state, Traced, none, mesh, (batch, batch), None, {})
        blocks(programs["train"]().jaxpr, found)
    assert len(found) == 2 * 3 and len(set(map(id, found))) == 2


def blocks(jaxpr, found):
    """Collects the jaxprs of blocks that are called in a jaxpr."""
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if "one_block" in str(equation.params.get("name")):
            found.append(inner.jaxpr)
        elif inner is not None:
            blocks(getattr(inner, "jaxpr", inner), found)
