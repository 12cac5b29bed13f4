"""How fast text is generated, beside what reading parameters and state takes.

    python -m experiments generation [--peers]
    python -m experiments generation --quick

The model has the shape of configs/gf_mh_base.py and random weights; every row draws at temperature
1 from the whole vocabulary. Tokens per second are those of the generation engine's own loop, with
every burst's tokens brought to the host: the median of several stretches ± half their range. The
floor is every parameter that a step multiplies by, and every state read and written, at the
bandwidth of a large copy in the same run; "of floor" is the floor's share of the time.

Then, for one row, the time per token after a short and a long text, in turns, and how long it takes
to read the long text, beside the training forward pass with its loss on as many tokens in rows of
configs/gf_mh_base.py's length.

--peers adds transformers' Mamba-2 with as many parameters, in a process of its own
(peers_generation.py). What cannot run here is listed with the reason. Numbers go to --out.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lab import command, results
from experiments.lab.timing import Decoder, copy_bandwidth, random_params, total_bytes
from gt_jax.config import from_config_dict
from gt_jax.config_files import load_config
from gt_jax.generation import prefill, slots
from gt_jax.models import count_parameters, make_model
from gt_jax.training.model import make_model_config

FULL = {
    "batches": (1, 16, 64, 256),
    "contexts": (1024, 65536),
    "seconds": 0.5,  # of a stretch
    "repeats": 5,
    "peer_tokens": 32,
}
QUICK = {
    "batches": (1, 2),
    "contexts": (128, 512),
    "seconds": 0.0,
    "repeats": 2,
    "peer_tokens": 4,
}


def main(argv=None):
    parser = command.plain_parser("generation", __doc__)
    parser.add_argument("--batches", nargs="+", type=int, help="instead of the usual ones")
    parser.add_argument("--peers", action="store_true", help="another library too")
    parser.add_argument("--quick", action="store_true", help="a small model, to try it out")
    command.add_out(parser, "generation")
    options = parser.parse_args(argv)
    options.out = results.path_of(options)
    command.check_can_be_written(options.out)  # else it would be found out once all has run
    effort = QUICK if options.quick else FULL
    batches = sorted(options.batches or effort["batches"])

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer's process needs it
    config = make_config(options.quick)
    model = make_model(make_model_config(config, config.data.vocab_size))
    parameters = count_parameters(model.config)["total"]
    peers = run_peer(parameters, batches, effort) if options.peers else []
    bandwidth = copy_bandwidth({"seconds": 0.2, "least_calls": 3, "repeats": effort["repeats"]})
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, copy {bandwidth / 1e9:,.0f} GB/s; "
        f"{parameters / 1e6:,.1f} M parameters, {model.config.dtype}, states float32"
    )
    params = random_params(model)

    found = {"device": device, "jax": jax.__version__, "parameters": parameters}
    found |= {"copy_bytes_per_second": bandwidth, "dtype": model.config.dtype, "decode": []}
    print(
        f"\n{'':22}{'batch':>6}{'tokens/s':>20}{'ms/step':>9}{'of floor':>9}{'peak MiB':>9}", end=""
    )
    print(f"{'compile s':>11}")
    for batch in batches:
        row = {"who": "gt_jax", "batch": batch} | decode(model, params, batch, bandwidth, effort)
        found["decode"].append(row)
        print_row(row)
    for row in peers:
        found["decode"].append(row)
        print_row(row)
    found["context"] = contexts(model, params, effort)
    found["prefill"] = time_prefill(model, params, effort, config.train.seq_len)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def make_config(quick):
    config = load_config("gf_mh_base")
    if quick:
        small = {"dim": 128, "layers": 2, "heads": 2, "state_size": 16}
        config.model.update(small)
        config.data.vocab_size, config.train.seq_len = 256, 128
    return from_config_dict(config)


def decode(model, params, batch, bandwidth, effort):
    """Numbers of one batch size."""
    decoder = Decoder(model, params, batch)
    bursts = max(1, round(effort["seconds"] / (decoder.run(1) * slots.BURST)))
    times = [decoder.run(bursts) for _ in range(effort["repeats"])]
    seconds = statistics.median(times)
    lookup = model.config.vocab_size * model.config.dim * 4  # of which a step reads a few rows
    moved = total_bytes(decoder.weights) - lookup + 2 * total_bytes(decoder.slots.state)
    memory = jax.local_devices()[0].memory_stats() or {}
    rates = [batch / t for t in times]
    return {
        "tokens_per_second": batch / seconds,
        "spread": (max(rates) - min(rates)) / 2,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * moved / bandwidth,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compile_seconds": decoder.compile_seconds,
    }


def contexts(model, params, effort):
    """Time per token of one row after texts of different lengths."""
    lengths = effort["contexts"]
    text = random_tokens(model, max(lengths) + 1)  # the last token waits for the loop that draws
    decoders = [Decoder(model, params, 1, prefill(model, params, text[: n + 1])) for n in lengths]
    bursts = max(1, round(effort["seconds"] / (decoders[0].run(1) * slots.BURST)))
    times = [[decoder.run(bursts) for decoder in decoders] for _ in range(2 * effort["repeats"])]
    ms = [1e3 * statistics.median(column) for column in zip(*times)]
    print(
        f"\nafter {lengths[0]:,} tokens {ms[0]:.3f} ms a token, after {lengths[1]:,} {ms[1]:.3f}: "
        f"{100 * (ms[1] / ms[0] - 1):+.1f} %"
    )
    return {"lengths": lengths, "ms": ms}


def time_prefill(model, params, effort, seq_len):
    """Seconds to read a long text, and of the training forward pass on as many tokens."""
    length = max(effort["contexts"])
    tokens = random_tokens(model, length + 1)
    rows = {"tokens": length, "rows": length // seq_len, "seq_len": seq_len}
    inputs, targets = (z.reshape(-1, seq_len) for z in (tokens[:-1], tokens[1:]))

    @jax.jit
    def loss(params, inputs, targets):
        logits = model.apply({"params": params}, inputs).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    seconds = {
        "prefill_seconds": clock(lambda: prefill(model, params, tokens), effort["repeats"]),
        "forward_seconds": clock(lambda: loss(params, inputs, targets), effort["repeats"]),
    }
    read, forward = seconds.values()
    print(
        f"prefill of {length:,} tokens {1e3 * read:.1f} ms, {length / read:,.0f} tokens/s: "
        f"{read / forward:.2f} of the training forward pass, {1e3 * forward:.1f} ms"
    )
    return rows | seconds


def clock(function, repeats):
    """Median seconds of a call, the first one apart."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def random_tokens(model, length):
    rng = np.random.default_rng(0)
    return rng.integers(model.config.vocab_size, size=length, dtype=np.int32)


def run_peer(parameters, batches, effort):
    """Rows of the PyTorch process, or one with the reason why there are none."""
    command = [sys.executable, "-m", "experiments.benchmarks.peers_generation", *map(str, batches)]
    command += [f"--parameters={parameters}", f"--tokens={effort['peer_tokens']}"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(rows) < len(batches):
        reason = (done.stderr.strip() or "it ended early").splitlines()[-1]
        rows.append({"who": "transformers Mamba2", "reason": reason})
    return rows


def print_row(row):
    if "reason" in row:
        print(f"{row['who']:22}  {row['reason']}")
        return
    rate = f"{row['tokens_per_second']:,.0f} ± {row['spread']:,.0f}"
    line = f"{row['who']:22}{row['batch']:6}{rate:>20}{row['ms']:9.3f}"
    line += f"{100 * row['floor_ms'] / row['ms']:7.0f} %" if "floor_ms" in row else " " * 9
    line += f"{row['peak_bytes'] / 2**20:9.0f}" if row["peak_bytes"] else " " * 9
    line += f"{row['compile_seconds']:11.1f}" if "compile_seconds" in row else ""
    print(line, flush=True)


if __name__ == "__main__":
    command.run(main)
