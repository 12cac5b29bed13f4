"""Where a training step's time goes, on one device.

    python -m experiments profile_training --config=configs/gf_mh.py [--config.model.impl=chunked]
    python -m experiments profile_training --config=configs/gf_mh_base.py --timed_steps=20
    ... --config.train.batch_size=8 --config.train.seq_len=2048

Trains random weights on random tokens with the trainer's own step. Prints seconds to the end of
the first step, tokens per second (median of five timed stretches, without evaluation), model FLOPs
per second and their share of the device's peak, peak memory of the device, and the costliest
operations of a traced step by device time, like adding to like over the layers.
gt_jax/training/utilization.py says how model FLOPs are counted.
"""

import collections
import re
import sys

import jax
import numpy as np
from absl import flags as absl_flags

from experiments.lab import command, traces
from experiments.lab.timing import Trainer
from gt_jax import cli
from gt_jax.config import computation_dtype, from_config_dict
from gt_jax.training import backend
from gt_jax.training.utilization import flops_per_token, peak_flops


def main(argv=None):
    argv = ["profile_training", *(sys.argv[1:] if argv is None else argv)]
    flags = cli.new_flags()
    cli.define_config(flags, argv)
    vocabulary = "Token ids; 0: SentencePiece's number as configured, or 65 characters."
    absl_flags.DEFINE_integer("vocab", 0, vocabulary, flag_values=flags)
    absl_flags.DEFINE_integer("timed_steps", 100, "Steps of a timed stretch.", flag_values=flags)
    absl_flags.DEFINE_integer("top", 15, "Operations to print.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__):
        return
    config = from_config_dict(flags.config)
    tokenizer_vocab = config.data.vocab_size if config.data.tokenizer == "sentencepiece" else 65
    vocab = flags.vocab or tokenizer_vocab
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


def print_flops(config, length, rate, device):
    """Model FLOPs per second and, where it is known, their share of the device's peak."""
    per_token = flops_per_token(config, length)
    line = f"{per_token * rate / 1e12:.4g} TFLOP/s of the model"
    if peak := peak_flops(device):
        share = per_token * rate / peak / jax.device_count()
        line += f", {100 * share:.1f} % of {peak / 1e12:.0f} a device (bfloat16, dense)"
    print(line)


def print_costs(run, hlo, *, steps, top):
    """Device time by operation of the model over a traced run of some steps."""
    origin = {}
    for name, where in re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo):
        layer = r"LanguageModel(\.\w+)?|blocks_\d+/"
        where = re.sub(rf"jit\(\w+\)/|{layer}|while/body/|closed_call/", "", where)
        origin[re.sub(r"\W", "_", name)] = where
    total, count = collections.Counter(), collections.Counter()
    for event in traces.operations(lambda: run(steps)):
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
    command.run(main)
