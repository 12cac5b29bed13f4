"""What the original published of its base models and arbiters in Phase 0 and 1, to be judged.

A claim is shown once the results that answer it are there; lab/claims.py has all others.
"""

from experiments.lab import formats
from experiments.lab.measures import Measure
from experiments.lab.rules import Claim, Verdict, all_within, unlike

NOTEBOOKS = "notebooks 0.1 and 0.1b"
SATURATED = 0.01  # share of positions, above which an output counts as saturated
FAMILIES = ("RWKV-6", "Mamba-2", "GPT", "GF-MH")
# Published: parameters of an arbiter of width 128; and here, named as in gt_jax.models.FUSIONS.
ARBITER_PARAMETERS = {"gru": 148_482, "mingru": 98_944, "glu": 49_664}


def variance(family, mixer, when, setting):
    """The Measure of a raw mixer's variance over that of its normalised input."""
    return Measure("characterize", f"mixer variance {family} {mixer}, {when}, {setting}")


def arbiter(key, name):
    """A Measure of questions/arbiters.py."""
    return Measure("arbiters", f"{key} {name}")


def judge_init(value_of):
    """Judge of whether BlinkDL's init cures saturation, and whether any small embedding does."""
    shares = {
        init: [
            value_of(Measure("characterize", f"saturated {f}, {init}, 50 steps")) for f in FAMILIES
        ]
        for init in ("BlinkDL init", "normal init", "unit embedding")
    }
    ours = "\n".join(
        f"{init}: " + ", ".join(f"{f} {formats.show(s)}" for f, s in zip(FAMILIES, found))
        for init, found in shares.items()
    )
    none = lambda init: all(s["high"] is not None and s["high"] < SATURATED for s in shares[init])
    if any(s["low"] is not None and s["low"] > SATURATED for s in shares["BlinkDL init"]):
        return Verdict("refuted", ours)
    if not none("BlinkDL init"):
        return Verdict("undecided", ours, "an interval reaches over 1 %", "more seeds")
    if none("normal init"):
        return Verdict("artefact", ours, "embeddings from N(0, 0.02) do the same")
    return Verdict("reproduced", ours)


def judge_arbiter_sizes(value_of):
    """Judge of the arbiters' parameters."""
    ours = {n: value_of(arbiter("parameters of a block", n)) for n in ARBITER_PARAMETERS}
    text = ", ".join(f"{name} {count:,}" for name, count in ours.items())
    near = all(abs(ours[n] / published - 1) < 1e-3 for n, published in ARBITER_PARAMETERS.items())
    return Verdict("reproduced" if near else "refuted", text)


PHASE1 = (
    Claim(
        "rwkv-amplifies",
        "An RWKV-6 mixer amplifies: the variance of what it says is above that of what it reads.",
        "by layer, in words; 5.5 x over 8 layers",
        "README 2, Phase 0",
        *unlike(
            variance("RWKV-6", "rwkv", "untrained", "unmatched"),
            variance("RWKV-6", "rwkv", "trained", "matched"),
            1,
            None,
        ),
    ),
    Claim(
        "mamba-damps",
        "A Mamba-2 mixer damps: it keeps a two-hundredth of the variance of what it reads.",
        "0.005 (an untrained layer on N(0, 1))",
        "notebooks, Phase 0",
        *unlike(
            variance("Mamba-2", "mamba", "untrained", "unmatched"),
            variance("Mamba-2", "mamba", "trained", "matched"),
            None,
            0.02,
        ),
    ),
    Claim(
        "blinkdl",
        "BlinkDL's init cures saturated outputs in all families.",
        "none above 0.99 after 50 steps, against 15.6 %",
        "README 2, Phase 0",
        ("characterize",),
        "Of positions where a token has a probability above 0.99, after 50 steps: refuted if their "
        "share is above 1 % in a family under BlinkDL's init, undecided if an interval reaches "
        "over it. Else artefact if it is below 1 % in all under N(0, 0.02) too, else reproduced.",
        judge_init,
    ),
    Claim(
        "arbiter-sizes",
        "GRU, minGRU and GLU arbiters of width 128 have 148 482, 98 944 and 49 664 parameters.",
        "148 482, 98 944, 49 664",
        NOTEBOOKS,
        ("arbiters",),
        "reproduced if all three are within 0.1 % (ours have two biases more), else refuted.",
        judge_arbiter_sizes,
    ),
    Claim(
        "arbiter-gru",
        "A GRU arbiter learns to weigh two branches by their variance.",
        "99.9 % of the error removed in 200 steps (94 and 99.1 % elsewhere), of single samples",
        NOTEBOOKS,
        *all_within([(arbiter("toy error removed", "gru"), 0.9, None)]),
    ),
    Claim(
        "arbiter-mingru",
        "A minGRU arbiter is 6 times faster than GRU at 1024 tokens, and learns half as well.",
        "6.02 x on a CPU; 48.1 % of the error removed (-4008 and 99.2 % elsewhere)",
        NOTEBOOKS,
        *all_within(
            [
                (arbiter("speed over GRU at 1024", "mingru"), 4, 9),
                (arbiter("toy error removed", "mingru"), 0.3, 0.7),
            ]
        ),
    ),
    Claim(
        "arbiter-glu",
        "A GLU arbiter is 42 times faster than GRU at 1024 tokens, and hardly learns.",
        "41.8 x on a CPU; 2.0 % of the error removed (93.7 % elsewhere)",
        NOTEBOOKS,
        *all_within(
            [
                (arbiter("speed over GRU at 1024", "glu"), 28, 63),
                (arbiter("toy error removed", "glu"), None, 0.2),
            ]
        ),
    ),
    Claim(
        "twin-collapse",
        "The twin-debate block collapses: in every layer one branch takes all the weight.",
        "8 of 8 layers (linear stand-ins on random tokens, after 1000 steps)",
        "notebook 0.4",
        *all_within([(Measure("debate", "blocks closed twin debate"), 7, None)]),
    ),
)
