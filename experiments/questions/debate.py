"""Does an auxiliary loss of the branches keep both alive, and does it lower the loss?

    python -m experiments debate --seeds=5

GF-MH and the twin-debate block of width 128 and 8 blocks, plain and with auxiliary losses: the
published diversity and arbiter losses, the repaired ones (gt_jax/training/debate.py), a task loss
of each branch, more entropy or, as the original's pilot had it, less, a balance of the branches,
and the repaired ones faded out in the middle third of the run. 2000 steps on characters, each at
the best of three rates. Run it in parts of --only and join them with --parts;
experiments/results/debate.json has the `seconds` of all parts together, of `residual` and `search`
as well.
"""

from experiments.lab import command, designs
from experiments.lab.designs import BRANCH, PUBLISHED, REPAIRED

TWIN = {"model.preset": "twin-debate"}
FADED = REPAIRED | {"debate.schedule": "fade"}
DESIGNS = {
    designs.BASE: {},
    "published": PUBLISHED,
    "repaired": REPAIRED,
    "repaired + all blocks": REPAIRED | {"debate.blocks": "all"},
    "repaired + faded": FADED,
    "branch losses": BRANCH,
    "more entropy": {"debate.entropy_weight": 0.05},
    "less entropy (published)": {"debate.entropy_weight": 0.05, "debate.entropy": "published"},
    "balance": {"debate.balance_weight": 0.1},
    "twin debate": TWIN,
    "twin debate + published": TWIN | PUBLISHED,
    "twin debate + repaired": TWIN | REPAIRED,
}


def main(argv=None):
    parser = command.parser("debate", __doc__)
    designs.add_flags(parser, steps=2000, seeds=5)
    options = command.parse(parser, argv)
    designs.study(
        options,
        DESIGNS,
        title="Auxiliary losses",
        notes=["Losses are the task's alone: what is added in training does not count in."],
    )


if __name__ == "__main__":
    command.run(main)
