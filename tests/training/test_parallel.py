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

# Devices are counted when JAX starts, so four simulated ones need a process of their own.
SCRIPT = """
import functools, json
import jax, numpy as np
from gt_jax.config import default_config
from gt_jax.config import from_config_dict
from gt_jax.data import make_batches
from gt_jax.models import make_config, make_model
from gt_jax.training import debate, optimizer, parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_eval_step, make_train_step

config = default_config()
config.update_from_flattened_dict({
    "train.batch_size": 16, "train.seq_len": 8, "optim.grad_accumulation": 2,
    "train.carry_state": True, "data.order": "tracks", "train.rwkv_dropout_start": 0.3,
    **{f"debate.{name}_weight": 0.1 for name in debate.NAMES},
})
config = from_config_dict(config)
# Groups of heads; and an RWKV branch that says something, as the balance of a row compares them.
sizes = {"dim": 32, "layers": 1, "heads": 2, "state_size": 8, "mamba_head_dim": 16}
fields = sizes | {"mamba_groups": 2, "branch_start": "neither"}
model = make_model(make_config("gf-mh", vocab_size=20, **fields))
schedule = make_schedule(config.optim, 20)
tx = make_optimizer(config.optim, schedule)
make_step = functools.partial(make_train_step, model, tx, schedule, config)
# Documents, some of which start where a device's tokens do.
text = [np.random.default_rng(0).integers(0, 20, n, dtype=np.int32) for n in (500, 300, 44, 156)]
result = {}
optimizer._LARGE = 1024  # moments of large leaves are cut, and this model has only small ones
plain = config, schedule, tx, make_step
config = default_config()
config.update_from_flattened_dict({
    "train.batch_size": 16, "train.seq_len": 8, "optim.name": "muon", "optim.ema": 0.5,
})
config = from_config_dict(config)
tx = make_optimizer(config.optim, schedule)
make_step = functools.partial(make_train_step, model, tx, schedule, config)
muon = config, schedule, tx, make_step
many = len(jax.devices()) > 4
meshes = {"fsdp and sequence": (2, 2)} | (many and {"fsdp": (8, 1), "sequence": (1, 2)} or {})
runs = {"single": (plain, ()), "jit": (plain, ()), "pmap": (plain, ()), "muon single": (muon, ())}
runs |= {name: (plain, mesh) for name, mesh in meshes.items()}
runs |= {f"muon {name}": (muon, mesh) for name, mesh in meshes.items()}
first = {}  # states of either optimizer
for name, ((config, schedule, tx, make_step), mesh) in runs.items():
    mode, mesh = name.removeprefix("muon "), parallel.make_mesh(*mesh)
    assert mesh.size == len(jax.devices())
    batches = make_batches(text, order="tracks", batch_size=16, seq_len=8)
    if mode == "single":
        init = functools.partial(init_state, model, tx, config, jax.random.key(config.seed))
        state, step = jax.jit(init)(), jax.jit(make_step(None))
        first[tx] = jax.device_get(state)
    else:
        shapes = jax.eval_shape(lambda: first[tx])
        state = jax.device_put(first[tx], parallel.state_sharding(mesh, shapes))
        compiled_mode = "pmap" if mode == "pmap" else "jit"
        step = parallel.compile_train_step(make_step, mesh, compiled_mode, shapes, activation=2**16)
    rows = []
    for _ in range(4):
        batch = next(batches)
        if mode != "single" and mode != "pmap":
            batch = parallel.put_batch(batch, mesh)
        state, numbers = step(state, batch)
        numbers = {name: np.asarray(value).tolist() for name, value in numbers.items()}
        rows.append(numbers)
    if mode != "single":
        cut = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
        assert any(cut) == ("fsdp" in mode)
        for leaf in jax.tree.leaves(state.carry):
            each = 16 * mesh.shape.get("sequence", 1) // mesh.size
            assert all(shard.data.shape[0] == each for shard in leaf.addressable_shards)
    if mode == name != "single":  # validation does not depend on the optimizer
        held_out = next(batches)
        eval_step = parallel.compile_eval_step(make_eval_step(model), mesh)
        sums, _ = eval_step(state.evaluated, held_out, None)
        rows.append({"loss": float(sums.loss), "tokens": int(sums.tokens)})
    result[name] = rows

# The balance of rows whose halves differ, and its gradient, on devices that share them or not.
P = jax.sharding.PartitionSpec
def balance(w, r, m):
    branches = debate._Branches(None, None, r, m, None, None, w)
    counted = w > 0.1
    return jax.numpy.sum(debate._balance([branches], counted), where=counted)
mesh, rows = parallel.make_mesh(1, 2), P("batch", "sequence")
shared = jax.shard_map(
    jax.value_and_grad(balance), mesh=mesh, in_specs=rows, out_specs=(P(), rows), check_vma=False
)
def on_devices(*arrays):
    total = jax.shard_map(
        lambda *x: jax.lax.psum(balance(*x), mesh.axis_names), mesh=mesh, in_specs=rows,
        out_specs=P(), check_vma=False,
    )(*arrays)
    return total, shared(*arrays)[1]
rng = np.random.default_rng(0)
arrays = [rng.uniform(size=shape).astype("f") for shape in ((4, 8), (4, 8, 2), (4, 8, 2))]
arrays[1][:, :4] *= 9
result["balance"] = [
    [float(value), np.asarray(slope).tolist()]
    for value, slope in (f(*arrays) for f in (on_devices, jax.value_and_grad(balance)))
]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results():
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["jit", "pmap", "fsdp and sequence", "muon fsdp and sequence"])
def test_four_devices_train_like_one(results, mode):
    """With carried state, accumulation, branch dropout and every auxiliary loss; and with Muon.

    Only the order of sums differs.
    """
    single = "muon single" if mode.startswith("muon") else "single"
    for several, one in zip(results[mode], results[single]):
        assert several.keys() == one.keys()
        for name in one:
            # A gate that is constant has a deviation of rounding alone.
            rounding = {"abs": 1e-6} if name == "gate_std" else {}
            assert several[name] == pytest.approx(one[name], rel=1e-4, **rounding), name


def test_balance_is_of_whole_rows_where_devices_share_them(results):
    (value, slope), (expected, expected_slope) = results["balance"]
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-6)


def test_four_devices_evaluate_alike_in_every_mode(results):
    assert results["jit"][-1] == pytest.approx(results["pmap"][-1], rel=1e-5)
    assert results["jit"][-1] == pytest.approx(results["fsdp and sequence"][-1], rel=1e-4)


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
