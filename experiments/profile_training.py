"""Where a training step's time goes, on one device.

    python -m experiments.profile_training --config=configs/gf_mh.py [--config.model.impl=chunked]
    python -m experiments.profile_training --config=configs/gf_mh_base.py --timed_steps=20
    ... --config.train.batch_size=8 --config.train.seq_len=2048

Trains random weights on random tokens with the trainer's own step. Prints seconds to the end of
the first step, tokens per second (median of five timed stretches, without evaluation), model FLOPs
per second and their share of the device's peak, peak memory of the device, and the costliest
operations of a traced step by device time, like adding to like over the layers.

Model FLOPs are those of the definition, whatever the program does to get there: 6 per token and
parameter, each of which is multiplied and added once forward and twice backward, and likewise 12
per element of a recurrence's state, which is written and read (of attention, per key and value).
"""

import collections
import functools
import glob
import re
import tempfile
import time

import jax
import numpy as np
from absl import flags as absl_flags

from experiments.benchmark_generation import random_params
from experiments.programs import LOWERING
from gt_jax import cli
from gt_jax.config import computation_dtype, from_config_dict
from gt_jax.data import make_batches
from gt_jax.models import count_parameters, make_model
from gt_jax.training import backend, parallel
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step

# name in the device's -> FLOPs per second of dense bfloat16 products, by its maker
PEAK = {"H100": 989e12, "H200": 989e12}


def main(argv):
    flags = cli.new_flags()
    cli.define_config(flags, argv)
    vocabulary = "Token ids; 0: SentencePiece's number as configured, or 65 characters."
    absl_flags.DEFINE_integer("vocab", 0, vocabulary, flag_values=flags)
    absl_flags.DEFINE_integer("timed_steps", 100, "Steps of a timed stretch.", flag_values=flags)
    absl_flags.DEFINE_integer("top", 15, "Operations to print.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__, required=("config",)):
        return
    config = from_config_dict(flags.config)
    pieces = config.data.vocab_size if config.data.tokenizer == "sentencepiece" else 65
    vocab = flags.vocab or pieces
    backend.prepare()
    trainer = Trainer(config, vocab)
    first = trainer.compile_seconds + trainer.run(1)
    B, T = config.train.batch_size, config.train.seq_len
    device, dtype = jax.devices()[0].device_kind, computation_dtype(config.model.dtype)
    print(f"{device}, {dtype}, jax {jax.__version__}: first step {first:.1f} s")
    trainer.run(10)
    rates = [flags.timed_steps * B * T / trainer.run(flags.timed_steps) for _ in range(5)]
    rate = np.median(rates)
    print(
        f"{rate:,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}), "
        f"{1e3 * B * T / rate:.2f} ms a step of {B} x {T}"
    )
    print_flops(trainer.model.config, T, rate, device)
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        print(f"peak memory {memory['peak_bytes_in_use'] / 2**20:,.0f} MiB")
    print_costs(trainer.run, trainer.compiled.as_text(), steps=3, top=flags.top)


class Trainer:
    """The trainer's own step on random tokens, ready to be timed."""

    def __init__(self, config, vocab):
        """Args: config: of the run, on all devices. vocab: number of token ids."""
        mesh = parallel.make_mesh()
        self.model = make_model(make_model_config(config, vocab))
        schedule = make_schedule(config.optim, config.train.steps)
        tx = make_optimizer(config.optim, schedule)
        init = functools.partial(init_state, self.model, tx, config)
        zeros = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0))
        )
        state = zeros.replace(params=random_params(self.model))
        self.state = jax.device_put(state, parallel.state_sharding(mesh))
        B, T = config.train.batch_size, config.train.seq_len
        tokens = np.random.default_rng(0).integers(vocab, size=4 * B * T + 1, dtype=np.int32)
        batches = make_batches((tokens,), order="windows", batch_size=B, seq_len=T)
        self.feed = parallel.in_bursts(batches, mesh, "jit")

        began = time.perf_counter()
        make_step = functools.partial(make_train_step, self.model, tx, schedule, config)
        train_step = parallel.compile_train_step(make_step, mesh, "jit")
        with LOWERING:
            lowered = train_step.lower(self.state, next(self.feed)[0])
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, steps):
        """Seconds of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            batch, _ = next(self.feed)
            self.state, metrics = self.compiled(self.state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def print_flops(config, length, rate, device):
    """Model FLOPs per second and, where it is known, their share of the device's peak."""
    per_token = flops_per_token(config, length)
    line = f"{per_token * rate / 1e12:.4g} TFLOP/s of the model"
    for name, peak in PEAK.items():
        if name in device:
            share = per_token * rate / peak / jax.device_count()
            line += f", {100 * share:.1f} % of {peak / 1e12:.0f} a device (bfloat16, dense)"
    print(line)


def flops_per_token(config, length):
    """FLOPs of training on one token in rows of `length`, as the module says."""
    parts = count_parameters(config)
    multiplied = parts["total"] - parts.get("positions", 0)
    if not config.tie_embeddings:
        multiplied -= parts["embedding"]  # only looked up
    states = {
        "rwkv": config.dim * config.head_dim,
        "mamba": config.mamba_dim * config.state_size,
        "attention": config.dim * length,
    }
    mixers = config.branches.split("+") if config.architecture == "hybrid" else parts
    state = config.layers * sum(states.get(mixer, 0) for mixer in mixers)
    return 6 * multiplied + 12 * state


def print_costs(run, hlo, *, steps, top):
    """Device time by operation of the model over a traced run of some steps."""
    origin = {}
    for name, where in re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo):
        where = re.sub(r"jit\(\w+\)/|LanguageModel|blocks_\d+/|while/body/|closed_call/", "", where)
        origin[re.sub(r"\W", "_", name)] = where
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    devices = [p for p in planes if p.name.startswith("/device:")] or planes
    total, count = collections.Counter(), collections.Counter()
    for event in (event for plane in devices for line in plane.lines for event in line.events):
        name = re.sub(r"\W", "_", event.name)
        kind = re.sub(r"_\d+$", "", name)
        key = f"{kind}: {origin[name]}" if name in origin else kind
        total[key] += event.duration_ns / 1e6 / steps
        count[key] += 1 / steps
    whole = sum(total.values())
    print(f"device busy {whole:.2f} ms a step, {sum(count.values()):.0f} kernels; the costliest:")
    for key, ms in total.most_common(top):
        print(f"  {ms:8.3f} ms {100 * ms / whole:5.1f} % {count[key]:6.1f} x  {key}")


if __name__ == "__main__":
    cli.run(main)
