"""Where a training step's time goes.

    python -m experiments.profile_training --config=configs/gf_mh.py [--config.model.impl=chunked]

Trains on random tokens with the trainer's own compiled step. Prints seconds to compile, tokens per
second (median of five timed stretches, without evaluation), peak memory of the device, and the
costliest operations of a traced step by device time.
"""

import collections
import functools
import glob
import re
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.config import computation_dtype, from_config_dict
from gt_jax.data import Batch
from gt_jax.models import make_model
from gt_jax.train import _model_config as model_config_of
from gt_jax.training import parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step


def main(argv):
    flags = cli.new_flags()
    cli.define_config(flags, argv)
    absl_flags.DEFINE_integer("vocab", 65, "Vocabulary of the random tokens.", flag_values=flags)
    absl_flags.DEFINE_integer("timed_steps", 100, "Steps of a timed stretch.", flag_values=flags)
    absl_flags.DEFINE_integer("top", 15, "Operations to print.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__, required=("config",)):
        return
    config = from_config_dict(flags.config)
    mesh = parallel.make_mesh()
    model = make_model(model_config_of(config, flags.vocab))
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    step = parallel.compile_train_step(make_step, mesh, config.parallel.mode)
    state = jax.jit(
        functools.partial(init_state, model, tx, config),
        out_shardings=parallel.state_sharding(mesh),
    )()
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(flags.vocab, size=(shape[0], shape[1] + 1))
    tokens = tokens.astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, np.ones(shape[0], bool))

    def run(state, steps):
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return state

    began = time.perf_counter()
    state = run(state, 1)
    print(
        f"first step {time.perf_counter() - began:.1f} s ({mesh.devices.flat[0].device_kind}, "
        f"{computation_dtype(config.model.dtype)}, jax {jax.__version__})"
    )
    state = run(state, 10)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        state = run(state, flags.timed_steps)
        rates.append(flags.timed_steps * shape[0] * shape[1] / (time.perf_counter() - began))
    print(
        f"{np.median(rates):,.0f} tokens/s (from {min(rates):,.0f} to {max(rates):,.0f}), "
        f"{1e3 * shape[0] * shape[1] / np.median(rates):.2f} ms a step of {shape[0]} x {shape[1]}"
    )
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        print(f"peak memory {memory['peak_bytes_in_use'] / 2**20:,.0f} MiB")
    _print_costs(lambda: run(state, 3), steps=3, top=flags.top)


def _print_costs(traced, *, steps, top):
    """Device time by operation; numbers in operations' names are dropped, so like adds to like."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    devices = [p for p in planes if p.name.startswith("/device:")] or planes
    total, count = collections.Counter(), collections.Counter()
    for line in (line for plane in devices for line in plane.lines):
        if line.name.startswith(("XLA", "Steps", "Framework", "Source")):
            continue  # summaries of the streams' events
        for event in line.events:
            name = re.sub(r"[._]?\d+$", "", event.name)
            total[name] += event.duration_ns / 1e6 / steps
            count[name] += 1 / steps
    whole = sum(total.values())
    print(f"device busy {whole:.2f} ms a step, {sum(count.values()):.0f} kernels; the costliest:")
    for name, ms in total.most_common(top):
        print(f"  {ms:8.3f} ms  {100 * ms / whole:4.1f} %  {count[name]:6.1f} x  {name[:100]}")


if __name__ == "__main__":
    cli.run(main)
    sys.exit()
