"""What a run's own numbers say of its health: gates that collapsed, rules that end it.

A gate is closed where one branch has all the weight, and constant where it weighs every position
alike. Both are judged block by block, from the rows of metrics.jsonl.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gt_jax import thresholds
from gt_jax.analysis import measure_health
from gt_jax.config import Config
from gt_jax.data import Batch
from gt_jax.models import LanguageModel, Params
from gt_jax.training import lora

PROBED_ROWS = 8  # of a batch


def make_probe(
    model: LanguageModel, config: Config, mesh: Mesh | None = None
) -> Callable[[Params, Batch], dict]:
    """probe(params, batch) -> what `measure_health` says of a batch's first rows.

    It is {} for a run without log.activations. The numbers are on every device of a mesh.
    """
    if not config.log.activations:
        return lambda params, batch: {}

    def measure(params, inputs, segment_ids):
        inputs, segment_ids = jax.tree.map(lambda x: x[:PROBED_ROWS], (inputs, segment_ids))
        return measure_health(model, lora.merged(params), inputs, segment_ids)

    measure = jax.jit(measure, out_shardings=NamedSharding(mesh, P()) if mesh else None)
    return lambda params, batch: measure(params, batch.inputs, batch.segment_ids)


def judged_from(config: Config) -> int:
    """The first step at which gates are judged: before, they are as model.gate_init set them."""
    begun = math.ceil(thresholds.COLLAPSE_AFTER * config.train.steps)
    return max(begun, config.optim.warmup_steps)


def collapsed(row: Mapping) -> dict[int, str]:
    """Block -> "closed" or "constant", of those whose gate collapsed in a row of metrics.jsonl."""
    found = {}
    deviations = row.get("gate_std") or [None] * len(row.get("gate") or ())
    for layer, (gate, deviation) in enumerate(zip(row.get("gate") or (), deviations)):
        if gate is None:
            continue
        if not thresholds.GATE_CLOSED <= gate <= 1 - thresholds.GATE_CLOSED:
            found[layer] = "closed"
        elif deviation is not None and deviation < thresholds.GATE_CONSTANT:
            found[layer] = "constant"
    return found


def describe(found: Mapping[int, str], row: Mapping) -> str:
    """What collapsed, as one line for people."""
    said = {
        "closed": lambda n: f"{n} (RWKV's weight {row['gate'][n]:.3f})",
        "constant": lambda n: f"{n} (standard deviation {row['gate_std'][n]:.4f})",
    }
    parts = []
    for kind, of_block in said.items():
        blocks = [of_block(n) for n, k in found.items() if k == kind]
        if blocks:
            parts.append(f"{kind} in block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)}")
    return f"collapse: the gate is {'; '.join(parts)}"


class Alarm:
    """Says that gates have collapsed, or no longer are, when that changes."""

    def __init__(self, config: Config):
        self._from = judged_from(config)
        self._found: dict[int, str] = {}

    def look(self, row: Mapping) -> str | None:
        """A line about a row as metrics.jsonl has it; None if nothing is new."""
        if row["step"] < self._from or not row.get("gate"):
            return None
        found = collapsed(row)
        if found == self._found:
            return None
        self._found = found
        return describe(found, row) if found else "no gate is collapsed any more"


def broken_rule(rows: Sequence[Mapping], config: Config) -> str | None:
    """Why a run should stop by the rules in train.stop_rules, as "rule: reason"; None if not.

    Args:
        rows: of metrics.jsonl, oldest first; the last one has an evaluation.
        config: uses train.stop_rules and what `judged_from` does.
    """
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    for name in thresholds.split_rules(config.train.stop_rules):
        late = evaluated[-1]["step"] >= judged_from(config) if evaluated else False
        reason = _RULES[name](rows, evaluated) if late else None
        if reason:
            return f"{name}: {reason}"
    return None


def training_loss(rows: Sequence[Mapping], step: int, count: int = 10) -> float | None:
    """Mean of the last `count` logged training losses up to a step, None if there are none."""
    losses = [r["loss"] for r in rows if r["step"] <= step and r.get("loss") is not None]
    return statistics.fmean(losses[-count:]) if losses else None


def _gap(rows, evaluated):
    validation = evaluated[-1]["validation_loss"]
    training = training_loss(rows, evaluated[-1]["step"])
    if training is not None and validation - training > thresholds.GAP["warn"]:
        return f"validation loss {validation:.4f} against {training:.4f} in training"
    return None


def _rising(rows, evaluated):
    losses = [row["validation_loss"] for row in evaluated]
    last = losses[-thresholds.RISING_EVALUATIONS - 1 :]
    rises = all(a < b for a, b in itertools.pairwise(last))
    if rises and len(last) > thresholds.RISING_EVALUATIONS:
        return f"validation loss rose {thresholds.RISING_EVALUATIONS} times in a row"
    best = min(evaluated, key=lambda row: row["validation_loss"])
    before, now = (training_loss(rows, row["step"]) for row in (best, evaluated[-1]))
    falls = before is not None and now is not None and now < before
    if falls and losses[-1] > best["validation_loss"] * (1 + thresholds.RISING_SHARE):
        return (
            f"validation loss {losses[-1]:.4f} after {best['validation_loss']:.4f} at step "
            f"{best['step']}, while the training loss fell"
        )
    return None


def _ratio(rows, evaluated):
    before = evaluated[-2]["step"] if len(evaluated) > 1 else 0
    ratios = [r["r_m_ratio"] for r in rows if r["step"] > before and r.get("r_m_ratio")]
    if not ratios:
        return None
    mean = statistics.geometric_mean(ratios)
    if thresholds.inside(mean, thresholds.GRADIENT_RATIO["warn"]):
        return None
    return f"gradient norm of RWKV over Mamba's is {mean:.3g}"


def _oscillation(rows, evaluated):
    del rows
    last = [row["validation_loss"] for row in evaluated][-thresholds.OSCILLATION_EVALUATIONS :]
    if len(last) < thresholds.OSCILLATION_EVALUATIONS:
        return None
    share = statistics.stdev(last) / statistics.fmean(last)
    return f"validation losses vary by {share:.0%}" if share > thresholds.OSCILLATION else None


def _collapse(rows, evaluated):
    del rows
    found = collapsed(evaluated[-1])
    return describe(found, evaluated[-1]).removeprefix("collapse: ") if found else None


_RULES = {
    "gap": _gap,
    "rising": _rising,
    "ratio": _ratio,
    "oscillation": _oscillation,
    "collapse": _collapse,
}
