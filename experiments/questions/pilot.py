"""Does a hybrid keep both of its branches alive over 5000 steps, and is it better than GF-MH?

    python -m experiments pilot --designs="minGRU,GLU" --seeds=5
    python -m experiments pilot --designs="minGRU,GLU" --seeds=5 --only="GF-MH,GF"

Designs of questions/search.py of width 128 and 8 blocks learn 5000 steps on characters, beside
GF-MH, GF and hybrids of two branches of one kind, each at the best of three rates. The rule:

    alive    each branch has more than 5 % of the update, and the loss rises when it says nothing,
             both with 95 % intervals over seeds that leave out the opposite; no block's gate is
             closed or constant in any seed (of fusions with a gate for every position)
    idle     an interval lies on the other side, or a gate collapsed in most seeds; else undecided

Variance growth is reported beside that of the initial weights, entropy and the largest probability
as they are: an entropy above 5 nats, which the original wanted, is above ln(vocabulary) here.
docs/results.md says how long a design takes. --rates takes a rate that is known, --only and --parts
run it in parts.
"""

import numpy as np

from experiments.lab import branches, command, designs
from experiments.lab.designs import SEARCHED
from experiments.lab.families import CONTROLS
from experiments.lab.statistics import estimate

REFERENCES = {
    designs.BASE: {},
    "GF": {"model.preset": "gf"},
    **{f"GF-MH of {name}": changes for name, changes in CONTROLS.items()},
}


def main(argv=None):
    parser = command.parser("pilot", __doc__)
    designs.add_flags(parser, steps=5000, seeds=5)
    parser.add_argument("--designs", default="", help="of the search, with commas between them")
    options = command.parse(parser, argv)
    wanted = command.one_of(SEARCHED, options.designs, "--designs") if options.designs else []
    tried = REFERENCES | {name: SEARCHED[name] for name in wanted}
    designs.study(
        options,
        tried,
        title="Pilot",
        judge=verdict,
        few=1,
    )


def verdict(found):
    """("alive", "idle" or "undecided", why) of a design, from its measures, name -> [seeds].

    A design whose branches are of one kind, or that is no hybrid, is judged likewise.
    """
    idle, open_ends = [], []
    for branch in ("RWKV", "Mamba"):
        for what, least in (
            (f"{branch} share", branches.IDLE),
            (f"loss added without {branch}", 0.0),
        ):
            measured = estimate(found[what])
            if measured["low"] is None or measured["low"] <= least <= measured["high"]:
                open_ends.append(f"{what} is {measured['mean']:.3g}, interval over {least:g}")
            elif measured["high"] < least:
                idle.append(f"{what} is {measured['mean']:.3g}")
    for kind in ("closed", "constant"):
        blocks = np.asarray(found[f"blocks {kind}"])
        if np.median(blocks) > 0:
            idle.append(f"{np.median(blocks):g} gates are {kind} in most seeds")
        elif blocks.any():
            open_ends.append(f"gates are {kind} in {np.mean(blocks > 0):.0%} of the seeds")
    if idle:
        return "idle", "; ".join(idle)
    if open_ends:
        return "undecided", "; ".join(open_ends)
    return "alive", "both branches count, and every gate that can varies by position"


if __name__ == "__main__":
    command.run(main)
