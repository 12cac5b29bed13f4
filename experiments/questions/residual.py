"""Does a residual path of a branch keep it alive, and does it lower the loss?

    python -m experiments residual --seeds=5

GF-MH and a minGRU arbiter of width 128 and 8 blocks, with no residual path, Mamba's (h = n + M(n))
or both branches', and the twin-debate block: minGRU, Mamba's path, the update normalised, no
feed-forward. All read the same batches of characters for 2000 steps, each at the best of three
rates. Where a command may not take that long, run parts with --only, each into its own --out, and
join them with --parts; experiments/results/residual.json has the `seconds` of all together.
"""

from experiments.lab import command, designs

DESIGNS = {
    designs.BASE: {},
    "GF-MH + Mamba path": designs.fields("gf", "mamba"),
    "GF-MH + both paths": designs.fields("gf", "both"),
    "minGRU": designs.fields("mingru"),
    "minGRU + Mamba path": designs.fields("mingru", "mamba"),
    "minGRU + both paths": designs.fields("mingru", "both"),
    "twin debate": {"model.preset": "twin-debate"},
}


def main(argv=None):
    parser = command.parser("residual", __doc__)
    designs.add_flags(parser, steps=2000, seeds=5)
    options = command.parse(parser, argv)
    designs.study(options, DESIGNS, title="Residual paths")


if __name__ == "__main__":
    command.run(main)
