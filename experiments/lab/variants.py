"""Variants of one hybrid, trained as the original project did or as ours.

What questions that compare variants share: flags, arms, and the name and notes of the result.
"""

from experiments.lab import command
from experiments.lab.training import make_config, settings, text_task

REFERENCE_RATE = 3e-4  # the original's
RATES = (REFERENCE_RATE, 3e-3)  # and one near the best of a plain run
BRANCHES = {
    "official": {},
    "legacy": {
        "model.branch": "legacy",
        "model.init": "normal",
        "data.split": "tracks",
        "data.order": "tracks",
    },
}


def add_flags(parser):
    """Flags that fusion and ratio have in common."""
    parser.add_argument(
        "--branch", choices=BRANCHES, default="official", help="RWKV's, as model.branch"
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument(
        "--start",
        choices=("init", "both", "neither"),
        default="init",
        help="outputs of the official branches that start at zero, as model.branch_start",
    )


def arms_of(options, preset, changes):
    """name -> (config, task) of a preset with some changes, under the flags' settings."""
    shared = {"model.preset": preset, "optim.lr": REFERENCE_RATE} | BRANCHES[options.branch]
    shared["model.branch_start"] = options.start
    shared |= command.common(options, evaluations=5)
    configs = {name: make_config(shared | change) for name, change in changes.items()}
    task = text_task(next(iter(configs.values())))
    return {name: (config, task) for name, config in configs.items()}


def result_name(options):
    """The experiment's name, with what was changed about it."""
    parts = [options.experiment]
    parts += ["legacy"] if options.branch == "legacy" else []
    parts += [options.start] if options.start != "init" else []
    parts += [str(options.steps)] if options.steps != 500 else []
    return "-".join(parts)


def settings_of(options, config):
    return {"branch": options.branch} | settings(config)


def notes_of(options):
    """What the data and the numbers of steps mean for comparison with published figures."""
    if options.branch == "legacy":
        text = "The ends of 64 slices of the text validate, as in the original project; the text "
        return [text + "is read in the original's order, so seeds differ in their first weights."]
    return ["A tenth of the text at its end validates, which is harder than the original's split."]
