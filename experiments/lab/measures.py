"""Measures that claims are judged by: the result that has them, and their names there.

A test finds each of them in experiments/results.
"""

from typing import NamedTuple


class Measure(NamedTuple):
    """One number of a result."""

    result: str
    name: str


# With our branch, and with the original's.
FINAL_GATE, FINAL_GATE_PUBLISHED = (
    Measure(result, "final gate GF-MH 0.3 at 3e-4") for result in ("ratio", "ratio-legacy")
)
GRADIENT_RATIO, GRADIENT_RATIO_PUBLISHED = (
    Measure(result, "R/M gradient ratio GF-MH 0.3 at 3e-4") for result in ("ratio", "ratio-legacy")
)
LOSS_AND_GRADIENT_RATIO, LOSS_AND_GRADIENT_RATIO_PUBLISHED = (
    Measure(result, "rank correlation of loss and R/M at 3e-4")
    for result in ("ratio", "ratio-legacy")
)
# Of gates that start apart, by learning rate: with our branch, and with the original's.
SPREAD_KEPT, SPREAD_KEPT_PUBLISHED = (
    {
        "3e-4": Measure(result, "gate spread kept at 0.0003"),
        "3e-3": Measure(result, "gate spread kept at 0.003"),
    }
    for result in ("ratio", "ratio-legacy")
)
ATTRACTOR, ATTRACTOR_PUBLISHED = (
    {
        "3e-4": Measure(result, "attractor at 0.0003"),
        "3e-3": Measure(result, "attractor at 0.003"),
    }
    for result in ("ratio", "ratio-legacy")
)
MAMBA_SHARE_PUBLISHED = Measure("paradox", "Mamba share, published")
MAMBA_SHARE = Measure("paradox", "Mamba share, trained")
LOSS_WITHOUT_MAMBA = Measure("paradox", "loss added without Mamba")
MAMBA_GRADIENT_PUBLISHED = Measure("paradox", "gradient Mamba / RWKV, untrained")
MAMBA_GRADIENT = Measure("paradox", "gradient Mamba / RWKV, trained")
# GF-MH's lead over two branches of one kind.
CONTROLS = {
    f"{control}, {text}": Measure("parity", f"{control} - GF-MH, {text}")
    for control in ("two RWKV-6", "two Mamba-2")
    for text in ("characters", "subwords")
}
GPT2_RATIO_SUBWORDS = Measure("parity", "loss ratio GF-MH / GPT-2, subwords")
GPT2_RATIO_CHARACTERS = Measure("parity", "loss ratio GF-MH / GPT-2, characters")
GPT2_SPEED = Measure("throughput", "training speed GPT-2 / GF-MH")
GROWTH_GPT_PUBLISHED = Measure("characterize", "growth GPT / RWKV-6, unmatched")
GROWTH_GPT = Measure("characterize", "growth GPT / RWKV-6, matched")
GROWTH_MAMBA_PUBLISHED = Measure("characterize", "growth RWKV-6 / Mamba-2, unmatched")
GROWTH_MAMBA = Measure("characterize", "growth RWKV-6 / Mamba-2, matched")
SATURATED_PUBLISHED = Measure("characterize", "saturated RWKV-6, unmatched")
SATURATED = Measure("characterize", "saturated RWKV-6, matched")
LONG_CONTEXT = Measure("context", "perplexity ratio 512 / 64")
CONTEXT_GAIN_PUBLISHED = Measure("context", "perplexity gain 8 to 64, as published")
CONTEXT_GAIN = Measure("context", "perplexity gain 8 to 64")
STATE_SHARE = Measure("states", "RWKV share of state norms")
PERSISTENCE = Measure("persistence", "state persistence GF-MH")
FACT_LEARNT = Measure("persistence", "fact GF-MH, turn 5")
NEEDLE = Measure("needle", "needle accuracy GF-MH")
SUBWORD_GRADIENT_RATIO = Measure("interventions", "R/M gradient ratio, subwords / characters")


def difference(result: str, a: str, b: str, at: str) -> Measure:
    """The loss of variant a less that of b, both "at" a learning rate, or each at its "best"."""
    return Measure(result, f"{a} - {b} at {at}")
