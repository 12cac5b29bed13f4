"""Times of the PyTorch libraries' kernels on a CUDA GPU; kernels.py --peers runs this.

    python -m experiments.benchmarks.peers_torch wkv6:8,4096,32,64 ssd:8,4096,64,128

WKV6 (B,T,H,K) is flash-linear-attention's chunk_rwkv6, SSD (B,T,H,N) mamba_ssm's
mamba_chunk_scan_combined with its usual chunk of 256. Both tune themselves for minutes on their
first call of a kind. Prints a JSON line per shape: median device ms and half the range of several
timings by CUDA events, with the second-level cache flushed before each call; bytes in use beyond
inputs, output and gradients at the peak of forward and backward; seconds of the first call of both.

With --samples, one head of the inputs ("in_r", ...; "in_o" is the output's gradient), of the
gradients ("r", ...) and of the output ("o") goes into a file per shape, to be checked.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

DEVICE = "cuda"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", metavar="OP:B,T,H,SIZE")
    parser.add_argument("--samples", type=Path, help="folder for samples of what was computed")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for case in options.cases:
        op, shape = case.split(":")
        who, make = PEERS[op]
        try:
            function, inputs = make(*map(int, shape.split(",")))
            row, arrays = measure(function, inputs, options.repeats)
            if options.samples:
                row["sample"] = str(options.samples / f"{case.replace(':', '_')}.npz")
                np.savez(row["sample"], **one_head(arrays, arrays["o"].shape))
            del arrays, inputs
        except Exception as reason:  # of another library, it can be any
            row = {"reason": f"{type(reason).__name__}: {reason}".split("\n")[0]}
        print(json.dumps({"who": who} | row), flush=True)
        torch.cuda.empty_cache()


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def uniform(low, high, *shape):
    return torch.empty(shape, device=DEVICE).uniform_(low, high)


def fla_wkv6(B, T, H, K):
    """chunk_rwkv6 with the definition's scale of 1, and its inputs by name."""
    from fla.ops.rwkv6 import chunk_rwkv6

    r, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, 64)
    w = -torch.exp(1.5 * normal(B, T, H, K, dtype=torch.float32) - 2)
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": normal(H, K, dtype=torch.float32)}
    return lambda r, k, v, w, u: chunk_rwkv6(r, k, v, w, u, scale=1.0)[0], inputs


def mamba_ssd(B, T, H, N):
    """mamba_chunk_scan_combined on step sizes that are ready, and its inputs by name."""
    # The package's own __init__ wants compiled extensions that this function does not use.
    if spec := importlib.util.find_spec("mamba_ssm"):
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = {
        "x": normal(B, T, H, 64),
        "dt": torch.exp(uniform(np.log(1e-3), np.log(0.1), B, T, H)),
        "A": -uniform(1, 16, H),
        "B": normal(B, T, 1, N),
        "C": normal(B, T, 1, N),
        "D": normal(H, dtype=torch.float32),
    }
    return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D), inputs


PEERS = {"wkv6": ("fla chunk_rwkv6", fla_wkv6), "ssd": ("mamba_ssm", mamba_ssd)}


def measure(function, inputs, repeats):
    """A row of numbers, and what was read and what was computed, by name."""
    names, inputs = list(inputs), [z.requires_grad_() for z in inputs.values()]
    began = time.perf_counter()
    o = function(*inputs)
    do = torch.randn_like(o)

    def both():
        o = function(*inputs)
        return o, *torch.autograd.grad(o, inputs, do)

    both()
    torch.cuda.synchronize()
    row = {"compile_seconds": time.perf_counter() - began}
    with torch.no_grad():
        row["forward"] = clock(lambda: function(*inputs), repeats)
    row["backward"] = clock(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), repeats)
    row["both"] = clock(both, repeats)

    del o
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, *gradients = both()
    torch.cuda.synchronize()
    results = sum(z.numel() * z.element_size() for z in (o, *gradients))
    row["extra_bytes"] = torch.cuda.max_memory_allocated() - before - results
    arrays = {f"in_{name}": z for name, z in zip(names, inputs)} | dict(zip(names, gradients))
    return row, arrays | {"in_o": do, "o": o}


def clock(function, repeats):
    """Median ms of a call and half the range of several medians."""
    from triton.testing import do_bench

    times = [do_bench(function, warmup=50, rep=200, return_mode="median") for _ in range(repeats)]
    return {"ms": statistics.median(times), "spread": (max(times) - min(times)) / 2}


def one_head(arrays, shape):
    """What belongs to the middle head of the middle batch row: axes of 1, float64, by name."""
    row, head = shape[0] // 2, shape[2] // 2

    def cut(name, z):
        if name in ("u", "A", "D"):
            z = z[head : head + 1]
        elif name in ("B", "C"):
            z = z[row : row + 1]
        else:
            z = z[row : row + 1, :, head : head + 1]
        return z.detach().double().cpu().numpy()

    return {name: cut(name.removeprefix("in_"), z) for name, z in arrays.items()}


if __name__ == "__main__":
    main()
