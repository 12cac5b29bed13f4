"""How fast do batches come out of a prepared folder, and how fast with Grain's shuffle?

    python -m experiments reading --source=DST

DST is what `python -m gt_jax.prepare` made. One core makes batches of shuffled windows of several
lengths: ours, and the same rows read in the order of grain.MapDataset.shuffle, where the package
grain is installed. "cold" batches check the checksum of every block that they are the first to
touch; "warm" ones read blocks that have been checked. The command measures the median of --seeds
stretches, and prints this process's peak memory.
"""

import itertools
import resource
import statistics
import time

import numpy as np

from experiments.lab import command
from gt_jax.data import load_prepared, make_batches
from gt_jax.data.streams import MappedStream

SHAPES = ((64, 64), (32, 512), (8, 2048))  # rows, tokens in a row
SECONDS = 1.0  # of a stretch


def main(argv=None):
    parser = command.parser("reading", __doc__)
    options = command.parse(parser, argv)
    seconds = 0.01 if options.quick else SECONDS
    for batch_size, seq_len in SHAPES[:1] if options.quick else SHAPES:
        shape = {"batch_size": batch_size, "seq_len": seq_len}
        tokens = load_prepared(options.source).tokens.train
        batches = make_batches(tokens, order="windows", **shape)
        cold = rate(batches, batch_size * seq_len, seconds)
        if not options.quick:
            check(tokens)
        warm = [rate(batches, batch_size * seq_len, seconds) for _ in options.seeds]
        line = f"{batch_size:4} x {seq_len:5}  ours {said(warm)} (cold {cold / 1e6:.1f})"
        grain = grain_batches(tokens, **shape)
        if grain is not None:
            theirs = [rate(grain, batch_size * seq_len, seconds) for _ in options.seeds]
            line += f"  grain {said(theirs)}"
        print(f"{line}  million tokens/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{tokens.size:,} tokens to train on; peak memory {peak / 1024:,.0f} MiB")


def rate(batches, tokens: int, seconds: float) -> float:
    """Tokens per second of CPU time."""
    began = time.process_time()
    for count in itertools.count(1):
        next(batches)
        took = time.process_time() - began
        if took > seconds:
            return count * tokens / took


def said(rates):
    return f"{statistics.median(rates) / 1e6:.1f} ± {(max(rates) - min(rates)) / 2e6:.1f}"


def check(tokens):
    """Read all tokens once, so that every block has been checked."""
    for start in range(0, tokens.size, 1 << 16):
        tokens.read(np.array([start]), min(1 << 16, tokens.size - start))


def grain_batches(tokens, batch_size, seq_len):
    """Batches in the order of Grain's shuffle, each row read as ours are; None without Grain."""
    try:
        import grain  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError:
        return None
    stream = MappedStream(tokens)

    def row(i):
        start = np.array([i * seq_len])
        return stream.batch(start, seq_len, resets=True, crossing=True)

    windows = grain.MapDataset.range((tokens.size - seq_len) // seq_len).seed(0).shuffle()
    # Without threads of its own, whose time would count for whoever is measured next.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(windows.repeat().map(row).batch(batch_size).to_iter_dataset(options))


if __name__ == "__main__":
    command.run(main)
