"""Low-rank adapters: what they compute and learn, and the runs and checkpoints that have them."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

import gt_jax
from gt_jax import checkpoint
from gt_jax.config import Lora, default_config, from_config_dict
from gt_jax.convert import export_model, import_model
from gt_jax.errors import InputError
from gt_jax.train import train
from gt_jax.training import lora, parallel, watch
from gt_jax.training.metrics import read as read_metrics
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_gradients, make_train_step
from tests.convert import small


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights as mamba_ssm stores them, converted, beside a text of ids."""
    folder = tmp_path_factory.mktemp("base")
    import_model(small.store("mamba2", "mamba-ssm", folder), folder / "base", tokenizer="ids")
    ids = np.random.default_rng(0).integers(0, 7, 1500)
    (folder / "text.txt").write_text(" ".join(map(str, ids)))
    return folder


def config_of(base, **changes):
    config = default_config()
    small_run = {
        "model.init_from": str(base / "base"),
        "train.tune": "lora",
        "train.lora.rank": 3,
        "train.lora.alpha": 8.0,
        "train.lora.matrices": "kernel$|embedding",  # which devices cut along either axis
        "data.source": str(base / "text.txt"),
        "optim.lr": 0.01,
        "optim.warmup_steps": 0,
        "optim.grad_accumulation": 2,
        "optim.ema": 0.5,
        "optim.schedule": "constant",
        "train.steps": 4,
        "train.batch_size": 4,
        "train.seq_len": 12,
        "train.eval_at_start": True,
        "train.eval_tokens": 100,
        "train.sample_tokens": 0,
        "checkpoint.every": 2,
        "log.tensorboard": False,
    }
    config.update_from_flattened_dict(small_run | changes)
    return from_config_dict(config)


def flat(tree):
    return {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}


def stored(run, step, part):
    """The arrays of a part of a checkpoint, by their paths, whatever devices wrote it."""
    folder = run / "checkpoints" / str(step)
    shapes = ocp.StandardCheckpointHandler().metadata(epath.Path(folder / part)).tree
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return flat(checkpoint.read_tree(folder, part, like))


@pytest.fixture(scope="module")
def runs(base):
    """A run of 4 steps, and the same, resumed after 2 without its base."""
    train(config_of(base), base / "whole")
    shutil.copytree(base / "whole", base / "resumed")
    shutil.rmtree(base / "resumed" / "checkpoints" / "4")
    away = (base / "base").rename(base / "away")
    train(config_of(base), base / "resumed")
    away.rename(base / "base")
    return base / "whole", base / "resumed"


def merge_in_float64(before, adapters):
    """Independent of gt_jax: W + scale * A B for each pair, rounded once."""
    expected = {}
    for name, kernel in before.items():
        a, b = (adapters.get(f"{name}/lora_{letter}") for letter in "ab")
        if a is not None:
            update = adapters["scale"].astype(float) * (a.astype(float) @ b.astype(float))
            kernel = (kernel.astype(float) + update).astype(np.float32)
        expected[name] = kernel
    return expected


def test_a_run_saves_the_base_with_its_adapters_merged(base, runs):
    before = flat(gt_jax.load(base / "base")[1])
    after = flat(gt_jax.load(f"{runs[0]}@last")[1])
    adapters = stored(runs[0], 4, "adapters")
    assert len(adapters) == 1 + 2 * 5 and adapters["scale"] == np.float32(8 / 3)
    for name, expected in merge_in_float64(before, adapters).items():
        if f"{name}/lora_a" in adapters:
            assert np.abs(after[name] - before[name]).max() > 1e-4
            np.testing.assert_allclose(after[name], expected, rtol=2e-7, atol=1e-8)
        else:
            np.testing.assert_array_equal(after[name], before[name])
    training = stored(runs[0], 4, "training")  # where frozen values are, to continue from
    for name, value in before.items():
        np.testing.assert_array_equal(training[f"params/{name}"], value)
    size = sum(x.size for name, x in adapters.items() if name != "scale")
    moments = sum(x.size for name, x in training.items() if name.startswith("opt_state"))
    assert moments == 2 * size + 1


def test_a_run_resumes_to_the_bit_without_the_base(runs):
    for part in ("params", "adapters", "training"):
        whole, resumed = (stored(run, 4, part) for run in runs)
        assert whole.keys() == resumed.keys()
        for name in whole:
            np.testing.assert_array_equal(whole[name], resumed[name])
    losses = [[row["validation_loss"] for row in read_metrics(run)][-1] for run in runs]
    assert losses[0] == losses[1]


def test_the_model_that_leaves_has_the_bits_of_the_one_that_is_loaded(runs, tmp_path):
    export_model(runs[0], tmp_path / "there", layout="mamba-ssm")
    import_model(tmp_path / "there", tmp_path / "back", tokenizer="ids")
    small.assert_same(gt_jax.load(tmp_path / "back")[1], gt_jax.load(runs[0])[1])


def test_checkpoints_are_averaged_as_merged_models(runs):
    several = (flat(gt_jax.load(f"{runs[0]}@{step}")[1]) for step in (4, 2))
    mean = flat(gt_jax.load(f"{runs[0]}@2+4")[1])
    for (name, one), other in zip(next(several).items(), next(several).values()):
        np.testing.assert_array_equal(mean[name], (one + other) / 2)


def test_new_adapters_change_no_bit_of_what_the_base_computes():
    params = small.params_of("rwkv6")
    setting = Lora(rank=16)
    new = lora.added(params, setting, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, lora.merged(new), params)
    a = flat(new[lora.KEY])["blocks_1/ffn/key/kernel/lora_a"]
    assert a.shape == (64, 16) and a.std() == pytest.approx(64**-0.5, rel=0.1)
    kernels = {name for name in flat(params) if name.endswith("kernel")}
    assert set(lora.matched(params, setting)) == kernels and len(kernels) == 16
    drawn = [x for name, x in flat(new[lora.KEY]).items() if name.endswith("lora_a")]
    equal = [(x.shape == y.shape) and (x == y).all() for x in drawn for y in drawn if x is not y]
    assert not any(equal), "each matrix has a draw of its own"
    assert "Precision.HIGHEST" in str(jax.make_jaxpr(lora.merged)(new)), "no TF32 on a GPU"


def test_what_a_run_probes_is_the_merged_model(toy, make_config, make_batch, monkeypatch):
    monkeypatch.setattr(watch, "measure_health", lambda model, params, *_: params)
    config, _, _, state = toy_run(toy, make_config, **{"log.activations": True})
    params = jax.tree.map(lambda x: x + 0.1, state.params)  # at zero B changes nothing
    seen = watch.make_probe(toy, config)(params, make_batch(0))
    # The matrix and its update, numbers up to 2, may cancel: each sum is right to a rounding of 2.
    assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2**-22)
    jax.tree.map(assert_near, seen, lora.merged(params))


ON_TWO_DEVICES = """
import sys
from pathlib import Path
from gt_jax.train import train
from tests.training.test_lora import config_of

base = Path(sys.argv[1])
train(config_of(base, **{"parallel.fsdp": 2}), base / "fsdp")
"""


def test_devices_that_share_the_base_train_like_one(base, runs):
    """The last two steps of the run again, by two devices; only the order of sums differs."""
    shutil.copytree(runs[0], base / "fsdp")
    shutil.rmtree(base / "fsdp" / "checkpoints" / "4")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_TWO_DEVICES, str(base)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before = stored(runs[0], 2, "adapters")
    one, two = (stored(run, 4, "adapters") for run in (runs[0], base / "fsdp"))
    for name in one:
        moved = max(np.abs(one[name] - before[name]).max(), 1e-6)
        np.testing.assert_allclose(two[name], one[name], atol=1e-3 * moved)
    losses = [read_metrics(run)[-1]["validation_loss"] for run in (runs[0], base / "fsdp")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def toy_run(toy, make_config, **fields):
    """(config, tx, schedule, state) of a run that trains adapters of the toy."""
    of_adapters = {"train.tune": "lora", "model.init_from": "x", "train.lora.rank": 2}
    config = make_config(**of_adapters, **fields)
    schedule = make_schedule(config.optim, 20)
    tx = make_optimizer(config.optim, schedule)
    return config, tx, schedule, init_state(toy, tx, config, jax.random.key(0))


def test_pmap_trains_adapters_as_jit_does(toy, make_config, make_batch):
    found = []
    for mode in ("jit", "pmap"):
        config, tx, schedule, state = toy_run(toy, make_config)
        step = parallel.compile_train_step(
            functools.partial(make_train_step, toy, tx, schedule, config),
            parallel.make_mesh(),
            mode,
            activation=2**16,
        )
        for seed in range(3):
            state, _ = step(state, make_batch(seed))
        found.append(flat(state.params[lora.KEY]))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_gradients_are_those_of_the_merged_matrices(toy, make_config, make_batch):
    """dA = scale * dW B^T and dB = scale * A^T dW, in float64 from jax.grad of W."""
    config, _, _, state = toy_run(toy, make_config, **{"optim.grad_accumulation": 2})
    params = jax.tree.map(lambda x: x, state.params)
    drawn = np.random.default_rng(1)
    for name in ("blocks_0", "blocks_1"):  # at zero B hides A
        for branch in params[lora.KEY][name].values():
            shape = branch["kernel"][lora.B].shape
            branch["kernel"][lora.B] = jnp.asarray(drawn.normal(size=shape), jnp.float32)
    batch = make_batch(0)
    found = jax.jit(make_gradients(toy, config))(params, None, batch, state.rng, 0).grads
    everything = dataclasses.replace(config, train=dataclasses.replace(config.train, tune="none"))
    of_merged = jax.jit(make_gradients(toy, everything))
    expected = of_merged(lora.merged(params), None, batch, state.rng, 0).grads
    assert len(jax.tree.leaves(found)) == 8 and found["head"]["kernel"] is None
    adapters = flat(params[lora.KEY])
    for path, grad in flatten_dict(found[lora.KEY]).items():
        if grad is None:
            continue
        name = "/".join(path[:-1])
        slope = flat(expected)[name].astype(float) * 16 / 2
        a, b = (adapters[f"{name}/{which}"] for which in (lora.A, lora.B))
        wanted = slope @ b.T if path[-1] == lora.A else a.T @ slope
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train.lora.matrices": "q_proj"},
            r"train.lora.matrices='q_proj' matches no matrix; there are blocks_\*/mamba/conv1d/we",
        ),
        ({"train.lora.rank": 30}, "train.lora.rank=30 must be at most 29, the shorter side of emb"),
        ({"train.lora.rank": 0}, "train.lora.rank=0 must be at least 1"),
        ({"train.lora.matrices": "("}, r"train.lora.matrices=\( must be a regular expression"),
        ({"train.tune": "state"}, "train.lora is of train.tune=lora, and train.tune=state; set"),
        ({"model.init_from": None}, "train.tune=lora trains a part of a stored model; name one"),
        ({"train.tune": "lara"}, "train.tune='lara' must be one of .*did you mean 'lora'"),
    ],
)
def test_what_cannot_be_adapted_says_so(base, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        train(config_of(base, **changes), tmp_path / "run")
    assert "\n" not in str(refused.value)
