"""How much of a device a run uses: its memory at most, and the share of its arithmetic.

Model FLOPs are what the definition of a model asks for, whatever the program does to get there: 6
per token and parameter, each of which is multiplied and added once forward and twice backward, and
likewise 12 per element of a recurrence's state, which is written and read (of attention, per key
and value).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gt_jax.models import ModelConfig, count_parameters

# FLOP/s of dense bfloat16 products (float16 on V100 and T4) by how `device_kind` begins; the first
# that fits counts. Of NVIDIA's and Google's data sheets.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def flops_per_token(
    config: ModelConfig,
    length: int,
    *,
    frozen: bool = False,
    parts: Mapping[str, int] | None = None,
) -> int:
    """FLOPs of training on one token in rows of `length` tokens.

    Args:
        config: of the model.
        length: tokens in a row; only attention's count depends on it.
        frozen: matrices have no gradients, which are a third of their products.
        parts: what `count_parameters` says of the model, where that is known: it traces.
    """
    parts = parts or count_parameters(config)
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
    return (4 if frozen else 6) * multiplied + 12 * state


def peak_flops(kind: str) -> float | None:
    """FLOP/s of bfloat16 products at most, by a device's `device_kind`; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def measure(
    tokens_per_second: float | None, flops: int, devices: Sequence[Any]
) -> dict[str, float | int]:
    """What is known of these.

    Args:
        tokens_per_second: of all devices together; None where no step was timed yet.
        flops: of `flops_per_token`.
        devices: of the run, as jax.devices() has them.

    Returns:
        peak_memory: bytes, the most that one device of this process had in use so far.
        share_of_peak: of the devices' `peak_flops`, in [0, 1], in whatever type a run computes.
    """
    found = {}
    local = [d for d in devices if d.process_index == jax.process_index()]
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in local]
    if used and min(used) > 0:
        found["peak_memory"] = max(used)
    peak = peak_flops(devices[0].device_kind)
    if peak is not None and tokens_per_second:
        found["share_of_peak"] = tokens_per_second * flops / (peak * len(devices))
    return found


def describe(measured: dict) -> str:
    """Of a row that `measure` is part of: "  61.2 GB at most  31 % of peak", or less."""
    parts = []
    if "peak_memory" in measured:
        parts.append(f"  {measured['peak_memory'] / 1e9:.1f} GB at most")
    if "share_of_peak" in measured:
        parts.append(f"  {100 * measured['share_of_peak']:.0f} % of peak")
    return "".join(parts)
