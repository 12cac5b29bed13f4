"""What the original project published about these models, and what our measurements say of it.

A claim is judged by a rule (lab/rules.py) from measures that questions wrote (lab/measures.py),
never by hand. Results of --quick do not count.
"""

import contextlib
from collections.abc import Mapping

from experiments.lab import measures
from experiments.lab.measures import Measure
from experiments.lab.phase1 import PHASE1
from experiments.lab.rules import (
    Claim,
    NotMeasured,
    Verdict,
    better,
    judge_attractor,
    judge_extremes,
    judge_persistence,
    judge_premise,
    judge_size,
    unlike,
    within,
)


def judge_all(found: Mapping[str, dict]) -> list[tuple[Claim, Verdict]]:
    """Every claim with its verdict; one of PHASE1 once its results are there.

    Args:
        found: name -> result of lab/results.py's read; what is not there is not measured.
    """

    def value_of(measure):
        name, key = measure
        if name not in found:
            raise NotMeasured(f"not measured: there is no result {name}")
        if found[name]["quick"]:
            raise NotMeasured(f"not measured: {name} is from a trial run")
        value = found[name]["measures"].get(key)
        if value is None or (isinstance(value, dict) and value["mean"] is None):
            raise NotMeasured(f'not measured: {name} has no "{key}"')
        return value

    verdicts = []
    for claim in CLAIMS:
        try:
            verdicts.append((claim, claim.judge(value_of)))
        except NotMeasured as error:
            verdicts.append((claim, Verdict("undecided", because=str(error))))
    for claim in PHASE1:
        with contextlib.suppress(NotMeasured):
            verdicts.append((claim, claim.judge(value_of)))
    return verdicts


FUSIONS, RATIOS = "README, table of fusions", "README, table of gate starts"
# Of models of 205 million tokens, where they were trained; else measures.py has others.
LONG_RATIO = Measure("long_parity", "loss ratio GF-MH / GPT-2")
LONG_CONTEXT = Measure("long_parity", "perplexity ratio GF-MH, 512 / 64")
RANKING = "strategy document, 1000-step ranking"

CLAIMS = (
    Claim(
        "gf-hy",
        "One gate per position (GF) learns better than per-channel gains (HY).",
        "1.689 against 1.760, −4.0 %",
        FUSIONS,
        *better("GF", "HY", by=0.071),
    ),
    Claim(
        "cp-hy",
        "Concatenating and projecting (CP) learns better than per-channel gains (HY).",
        "1.692 against 1.760, −3.9 %",
        FUSIONS,
        *better("CP", "HY", by=0.068),
    ),
    Claim(
        "gf-cp",
        "One gate per position (GF) learns better than concatenating and projecting (CP).",
        "1.689 against 1.692",
        FUSIONS,
        *better("GF", "CP", by=0.003),
    ),
    Claim(
        "hy-ws",
        "One weight per layer (WS) is worse than per-channel gains (HY).",
        "1.819 against 1.760, +3.3 %",
        FUSIONS,
        *better("HY", "WS", by=0.059),
    ),
    Claim(
        "hy-rf",
        "Adding projected Mamba to RWKV (RF) is the worst fusion.",
        "1.948 against HY's 1.760, +10.7 %",
        FUSIONS,
        *better("HY", "RF", by=0.188),
    ),
    Claim(
        "gf-hgf",
        "One gate per position (GF) learns better than one per channel (HGF).",
        "1.61 against 1.69 after 1000 steps",
        RANKING,
        *better("GF", "HGF", by=0.08),
    ),
    Claim(
        "mh-gf",
        "Starting from 30 % RWKV (GF-MH) is better than from 50 %: the winner of the project.",
        "1.670 against 1.700, −1.75 %",
        RATIOS,
        *better("GF-MH 0.3", "GF 0.5", "ratio", by=0.03),
    ),
    Claim(
        "gf-rh",
        "Starting from 70 % RWKV (GF-RH) is worse than from 50 %.",
        "1.720 against 1.700, +1.2 % (README: +0.3 %)",
        RATIOS,
        *better("GF 0.5", "GF-RH 0.7", "ratio", by=0.005),  # the smaller of the two
    ),
    Claim(
        "extremes",
        "Starting from 3 % or from 97 % RWKV is worse than from 30 %.",
        "1.81 and 1.96 against about 1.58",
        "observation 14",
        ("ratio", "ratio-legacy"),
        "Both differences as for two variants; undecided unless both agree.",
        judge_extremes,
    ),
    Claim(
        "attractor",
        "Wherever the gate starts, training pulls it to one zone: an attractor.",
        "10 to 30 %; three documents give three sets of numbers, of gradient norms, not of gates",
        "observation 14, CHANGELOG, synthesis",
        ("ratio", "ratio-legacy"),
        "reproduced if at both rates the spread of the gates over five starts ends below half of "
        "what it was (95 % interval over seeds). If above at both, artefact if it is below at both "
        "with the original's branch, else refuted. Otherwise undecided.",
        judge_attractor,
    ),
    Claim(
        "drift",
        "A gate that starts at 0.3 learns to sit at 0.7.",
        "0.70",
        "validation report, S0",
        *unlike(measures.FINAL_GATE_PUBLISHED, measures.FINAL_GATE, 0.6, 0.8),
    ),
    Claim(
        "gradient-ratio",
        "Under GF-MH, RWKV's gradient is a tenth of Mamba's.",
        "norm ratio 0.10 to 0.27",
        RANKING,
        *unlike(measures.GRADIENT_RATIO_PUBLISHED, measures.GRADIENT_RATIO, 0.05, 0.3),
    ),
    Claim(
        "lower-with-ratio",
        "The smaller RWKV's gradient is beside Mamba's, the lower the loss.",
        "ranking of eight runs",
        RANKING,
        *unlike(
            measures.LOSS_AND_GRADIENT_RATIO_PUBLISHED, measures.LOSS_AND_GRADIENT_RATIO, 0.5, None
        ),
    ),
    Claim(
        "mamba-share",
        "Mamba contributes next to nothing to a hybrid.",
        "below 0.3 % (state norms of an untrained model)",
        "graduation tests, tasks 55 and 58",
        *unlike(measures.MAMBA_SHARE_PUBLISHED, measures.MAMBA_SHARE, None, 0.01),
    ),
    Claim(
        "mamba-removed",
        "A trained hybrid would not miss its Mamba branch.",
        "0.1 % in an ablation that ablated nothing",
        "graduation tests, task 58",
        *within(measures.LOSS_WITHOUT_MAMBA, -0.01, 0.02, unit=" nats"),
    ),
    Claim(
        "mamba-gradients",
        "Mamba's gradients are ten times RWKV's: one half of the Mamba paradox.",
        "0.0412 against 0.0042, one random batch at initialisation",
        "README, gate G4",
        *unlike(measures.MAMBA_GRADIENT_PUBLISHED, measures.MAMBA_GRADIENT, 3, 30),
    ),
    Claim(
        "two-kinds",
        "RWKV-6 and Mamba-2 complement each other: a hybrid is more than two branches.",
        "no figure: never held against two branches of one kind",
        "README, the project's premise",
        ("parity",),
        "reproduced if GF-MH is better than two RWKV-6 and than two Mamba-2 branches under the "
        "same gate, on characters and on subwords; refuted if one is better than it on either.",
        judge_premise,
    ),
    Claim(
        "gpt2-parity",
        "GF-MH equals GPT-2 on subword text.",
        "loss ratio 1.008 after 300 steps, at 6.8 nats",
        "README, task 62",
        *within(LONG_RATIO, 0.95, 1.05, otherwise=measures.GPT2_RATIO_SUBWORDS),
    ),
    Claim(
        "gpt2-characters",
        "GF-MH beats GPT-2 on characters.",
        "loss ratio 0.927 after 200 steps",
        "experiment 001",
        *within(measures.GPT2_RATIO_CHARACTERS, None, 0.95),
    ),
    Claim(
        "gpt2-size",
        "GF-MH does it with 17 % fewer parameters than GPT-2.",
        "5.62 M against 6.81 M",
        "README, task 62",
        (),
        "Counted, at a vocabulary of 16 000: artefact if the total is more than 10 % smaller and "
        "the blocks alone are not even 5 %.",
        judge_size,
    ),
    Claim(
        "gpt2-speed",
        "GF-MH trains 4.5 times slower than GPT-2.",
        "4.5 x (task 62); 2.1 to 5.1 x forward (observation 18)",
        "README 2",
        *within(measures.GPT2_SPEED, 3, 6),
    ),
    Claim(
        "variance",
        "State-space models keep the variance of their blocks: GPT grows 142 times more than RWKV.",
        "782 x for GPT against 5.5 x for RWKV-6 (standard deviations)",
        "README 2, Phase 0",
        *unlike(measures.GROWTH_GPT_PUBLISHED, measures.GROWTH_GPT, 30, None),
    ),
    Claim(
        "variance-mamba",
        "Mamba-2 keeps the variance of its blocks better than RWKV-6.",
        "2.0 x against 5.5 x",
        "README 2, Phase 0",
        *unlike(measures.GROWTH_MAMBA_PUBLISHED, measures.GROWTH_MAMBA, 1.5, None),
    ),
    Claim(
        "saturation",
        "RWKV-6 saturates its output: one token takes all the probability.",
        "15.6 % of positions above 0.99",
        "README 2, Phase 0",
        *unlike(measures.SATURATED_PUBLISHED, measures.SATURATED, 0.05, None),
    ),
    Claim(
        "long-context",
        "Perplexity hardly rises when the context is 512 tokens instead of 64.",
        "1.04 x (random tokens, untrained model)",
        "README 2, task 60",
        *within(LONG_CONTEXT, None, 1.1, otherwise=measures.LONG_CONTEXT),
    ),
    Claim(
        "context-gain",
        "A context of 64 characters instead of 8 lowers perplexity by a fifth to two fifths.",
        "21 to 43 % (positions without context counted in)",
        "LRD test",
        *unlike(measures.CONTEXT_GAIN_PUBLISHED, measures.CONTEXT_GAIN, 0.21, 0.43),
    ),
    Claim(
        "state-norms",
        "RWKV's state dwarfs Mamba's: nearly all of the memory's norm is RWKV's.",
        "99.8 % of the norm; variances 108 583 : 1 (a random stand-in)",
        "diagnostics D3 and S4",
        *within(measures.STATE_SHARE, 0.98, None),
    ),
    Claim(
        "state-persistence",
        "A hybrid keeps a fact over 50 turns of a conversation.",
        "50+ turns, a transformer 3 to 5 (a target, never measured)",
        "V5 gate, task 65",
        ("persistence",),
        'reproduced if the 95 % interval of "state persistence GF-MH" is at least 99, refuted if '
        "it is outside, undecided if it reaches over an end, or if a model that did not learn to "
        "answer in turn 5, half of the time, is among the seeds.",
        judge_persistence,
    ),
    Claim(
        "needle",
        "A character model cannot find a needle in its context.",
        "0 % (the needle was never in the prompt)",
        "task 21",
        *within(measures.NEEDLE, None, 0.05),
    ),
    Claim(
        "mamba-rate",
        "Mamba learns better at the full rate than at half of it.",
        "1.53 against 1.59",
        "task 36",
        *better("plain", "Mamba rate 0.5", "interventions", by=0.06),
    ),
    Claim(
        "short-warmup",
        "A warm-up of a tenth of the steps is better than of half of them.",
        "1.578 against 1.59",
        "observation 9",
        *better("plain", "warm-up 50 %", "interventions", by=0.012),
    ),
    Claim(
        "dropout",
        "Dropping RWKV early on wakes Mamba but costs loss.",
        "1.598 against 1.578",
        "observation 11",
        *better("plain", "RWKV dropout", "interventions", by=0.02),
    ),
    Claim(
        "balance",
        "A loss that balances the branches costs more than it gains.",
        "+0.15 (no code for it exists)",
        "CHANGELOG 4.10",
        *better("plain", "balanced", "interventions", by=0.15),
    ),
    Claim(
        "gate-freeze",
        "The gate must learn: frozen, it costs loss.",
        "+0.08, frozen for 100 steps (no code for it exists)",
        "CHANGELOG 4.10",
        *better("plain", "gate frozen", "interventions", by=0.08),
    ),
    Claim(
        "subwords",
        "Subword text balances the branches: R/M rises.",
        "0.20 to 0.46 against 0.08 to 0.11",
        "observation 12",
        *within(measures.SUBWORD_GRADIENT_RATIO, 1.5, 6),
    ),
)
