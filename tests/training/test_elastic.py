"""A run may resume on another number of devices, and in other shares of them."""

import json
import os
import subprocess
import sys

import jax
import numpy as np

import gt_jax
from gt_jax import train
from gt_jax.training.metrics import read

SETTINGS = {
    "model.layers": 1,
    "model.dim": 32,
    "model.heads": 2,
    "model.state_size": 8,
    "train.batch_size": 4,
    "train.seq_len": 16,
    "train.eval_tokens": 64,
    "train.sample_tokens": 0,
    "train.carry_state": True,
    "data.order": "tracks",
    "optim.warmup_steps": 1,
    "log.every": 1,
    "log.tensorboard": False,
}


def arguments(workdir, text, steps, **more):
    settings = SETTINGS | {"data.source": text, "train.steps": steps} | more
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["train", "--config=tiny", f"--workdir={workdir}", *flags]


def test_one_device_four_and_one_again_train_like_one(tmp_path, no_curve):
    """Same data in the same order; parameters equal but for the order of sums."""
    text = tmp_path / "text.txt"
    text.write_text("Now is the winter of our discontent made glorious summer. " * 40)
    straight, elastic = tmp_path / "straight", tmp_path / "elastic"
    # A schedule depends on train.steps: constant, so that a longer run is the same run.
    constant = {"optim.schedule": "constant", "train.eval_every": 1}
    train.main(arguments(straight, text, 6, **constant))

    train.main(arguments(elastic, text, 2, **constant))
    shares = {"parallel.fsdp": 2, "parallel.sequence": 2}
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "gt_jax.train"]
    command += arguments(elastic, text, 4, **constant, **shares)[1:]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "device: 4 x cpu" in done.stdout
    train.main(arguments(elastic, text, 6, **constant))

    expected, found = (
        {row["step"]: row["validation_loss"] for row in read(workdir)}
        for workdir in (straight, elastic)
    )
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-4)
    params = [gt_jax.load(f"{workdir}@last")[1] for workdir in (straight, elastic)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *params)
    starts = [json.loads(x) for x in (elastic / "provenance.jsonl").read_text().splitlines()]
    assert len(starts) == 3
