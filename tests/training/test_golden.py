"""Losses of the first 20 steps, of small models of every architecture on embedded Shakespeare.

    python -m tests.training.test_golden     prints them for the device and JAX at hand

A change that moves them on a CPU changes what is computed, not only how; rounding in another order
moves them by less than the tolerance. On a GPU two trainings, each compiled anew, must agree in
every bit of every parameter.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax.config import default_config, from_config_dict
from gt_jax.data import make_batches
from gt_jax.models import make_model
from gt_jax.training import parallel
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.prefetch import prefetch
from gt_jax.training.step import init_state, make_train_step
from gt_jax.training.text import read_text

PRESETS = ("tiny", "gf-mh", "rwkv6", "mamba2")
# Steps 1, 10 and 20 on a CPU in float32.
GOLDEN = {
    "tiny": (4.675649, 3.055695, 2.690346),
    "gf-mh": (4.695058, 2.971217, 2.615853),
    "rwkv6": (4.354352, 2.830311, 2.617322),
    "mamba2": (4.634518, 2.953454, 2.678343),
}
# Rounding grows over twenty steps. HY most of all: it norms a branch that begins at zero, which
# multiplies rounding by a thousand (JAX 0.10 and 0.12 differ by 2e-3).
TOLERANCE = {"tiny": 5e-3, "gf-mh": 2e-5, "rwkv6": 2e-5, "mamba2": 2e-5}


def train(preset, **fields):
    """Losses [20], and the parameters after them."""
    config = default_config()
    small = {"model.dim": 64, "model.layers": 2, "model.heads": 2, "model.state_size": 16}
    small |= {"train.batch_size": 4, "train.steps": 20, "optim.warmup_steps": 5}
    config.update_from_flattened_dict({"model.preset": preset} | small | fields)
    config = from_config_dict(config)
    text = read_text(config)
    batches = make_batches(
        text.tokens.train, order="windows", batch_size=4, seq_len=config.train.seq_len, seed=0
    )
    model = make_model(make_model_config(config, text.tokenizer.vocab_size))
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    mesh = parallel.make_mesh()
    state = jax.jit(functools.partial(init_state, model, tx, config))(jax.random.key(0))
    state = jax.device_put(state, parallel.state_sharding(mesh))
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    step = parallel.compile_train_step(make_step, mesh, "jit", activation=2**16)
    feed, losses = prefetch(batches, mesh, "jit"), []
    for _ in range(20):
        state, metrics = step(state, next(feed)[0])
        losses.append(metrics["loss"])
    return np.array(jax.device_get(losses)), jax.device_get(state.params)


trained_once = functools.cache(train)


@pytest.mark.optimized
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="golden losses are a CPU's")
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_twenty_steps_are_the_golden_ones(preset):
    losses, _ = trained_once(preset)
    np.testing.assert_allclose(losses[[0, 9, 19]], GOLDEN[preset], rtol=TOLERANCE[preset])


@pytest.mark.optimized
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="malloc gives a CPU's memory alone")
def test_losses_do_not_depend_on_what_memory_held_before():
    """Freed memory is reused, so an operation that read more than was written would show."""
    losses, _ = trained_once("gf-mh")
    code = f"import {__name__} as golden; print(golden.train('gf-mh')[0].tobytes().hex())"
    # Every byte of new memory is 0x7f, so a float32 is 3.4e38; no small blocks are kept unfilled.
    filled = {"MALLOC_PERTURB_": "128", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    filled |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | filled, capture_output=True)
    assert done.stdout.decode().strip() == losses.tobytes().hex(), done.stderr.decode()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="CPUs add in a fixed order anyway")
@pytest.mark.parametrize("preset", PRESETS)
def test_two_trainings_end_with_the_same_bits(preset):
    (losses, params), (again, params_again) = train(preset), train(preset)
    np.testing.assert_array_equal(losses, again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


if __name__ == "__main__":
    for name in PRESETS:
        found, _ = train(name)
        print(f'    "{name}": ({", ".join(f"{loss:.6f}" for loss in found[[0, 9, 19]])}),')
