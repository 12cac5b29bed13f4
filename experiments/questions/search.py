"""Which arbiter, residual path and auxiliary loss beat GF-MH, over a public list of designs?

    python -m experiments search --seeds=3
    python -m experiments search --seeds=3 --only="minGRU,GLU" --out=part.json

Every design of SEARCHED (lab/designs.py) has width 128 and 8 blocks. All read the same batches of
characters for 2000 steps, at each of three rates, GF-MH too. The first half of the validation text
chooses a design's rate, and the designs that `pilot` runs longer; the second half is reported.
Differences from GF-MH are Holm-corrected over all designs of the list, chosen or not.

Where a command may not take that long, run parts of the list with --only, each into its own --out,
and join them with --parts part1.json part2.json; experiments/results/search.json has the `seconds`
of all together.
"""

from experiments.lab import command, designs
from experiments.lab.designs import SEARCHED


def main(argv=None):
    parser = command.parser("search", __doc__)
    designs.add_flags(parser, steps=2000, seeds=3)
    options = command.parse(parser, argv)
    found = designs.study(options, SEARCHED, title="Designs")
    best = designs.chosen(found, 2)
    print(f"best on the first half: {', '.join(best)}")


if __name__ == "__main__":
    command.run(main)
