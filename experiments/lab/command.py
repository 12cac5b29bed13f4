"""The command line of the laboratory: flags that all questions share, errors in one line."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from gt_jax import cli
from gt_jax.errors import InputError

REPOSITORY = Path(__file__).parents[2]

# A tiny model for a few steps, to see that everything runs; its numbers mean nothing.
QUICK = {
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 2,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_tokens": 256,
    "optim.warmup_steps": 2,
}


def run(main) -> None:
    """main() of the command line; an InputError prints as one line, `error: ...`, with status 1."""
    # Threads of JAX's CPU backend, read when it starts. Where there are as few as two, parts of a
    # program of many runs can wait for one another forever.
    os.environ.setdefault("NPROC", "8")
    cli.run(lambda argv: main(argv[1:]))


class _Help(argparse.RawDescriptionHelpFormatter):
    """--help that keeps a docstring's lines and shows the default of every flag that has one."""

    def _get_help_string(self, action):
        shown, default = action.help or "", action.default
        unset = default is None or default is False or default in ("", argparse.SUPPRESS)
        if unset or "default" in shown:
            return shown
        if isinstance(default, Path) and default.is_relative_to(REPOSITORY):
            default = default.relative_to(REPOSITORY)
        default = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{shown} (default: {default.replace('%', '%%')})"


def plain_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser without flags, for an experiment whose flags are all its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {name}",
        description=doc,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.error = refuse
    parser.set_defaults(experiment=name, about=doc.strip().split("\n")[0])
    return parser


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all experiments have.

    --seeds N gives options.seeds = range(N).
    """
    parser = plain_parser(name, doc)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try it out")
    parser.add_argument("--source", default="shakespeare", help="text, as data.source")
    parser.add_argument("--impl", default="auto", help="of the recurrences, as model.impl")
    parser.add_argument("--group", type=int, help="most runs side by side; default: all that fit")
    add_out(parser, name)
    return parser


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --out, the file of a result; see `results.path_of`."""
    folder = "experiments/results"
    about = (
        f"result to write; default: {folder}/{name}.json, with --quick {folder}/quick/{name}.json"
    )
    parser.add_argument("--out", type=Path, help=about)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and when and by what command they were given.

    Raises:
        InputError: they are wrong; the message is one line.
    """
    began = time.perf_counter()
    options = parser.parse_args(argv)
    for name in ("seeds", "group"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name}={value} must be at least 1")
    options.began = began
    if getattr(options, "out", None):  # else it would be found out once all has run
        check_can_be_written(options.out)
    if "seeds" in options:
        options.seeds = range(options.seeds)
    given = [] if argv is None else argv
    options.command = shlex.join(["python", "-m", "experiments", options.experiment, *given])
    return options


def check_can_be_written(path: Path) -> None:
    """Raise InputError if not. Makes nothing: what follows may yet be refused."""
    path = path.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if path.is_dir():
        reason = "is a folder"
    elif there != path and not there.is_dir():
        reason = f"cannot be written: {there} is no folder"
    elif not os.access(there, os.W_OK):
        reason = f"cannot be written: no right to write {there}"
    else:
        return
    raise InputError(f"--out={path} {reason}; name another file")


def common(options: argparse.Namespace, *, evaluations: int | None = None) -> dict:
    """Config fields that the common flags set, and --steps and --lr of a parser that has them.

    Args:
        evaluations: how many of them --steps are to have, as far apart as one another; None leaves
            it to the config.
    """
    fields = {"data.source": options.source, "model.impl": options.impl}
    flags = {"steps": "train.steps", "lr": "optim.lr"}
    fields |= {field: getattr(options, flag) for flag, field in flags.items() if flag in options}
    if evaluations:
        fields["train.eval_every"] = max(options.steps // evaluations, 1)
    return fields | (QUICK if options.quick else {})


def size(options: argparse.Namespace, full: tuple[int, int]) -> tuple[int, int]:
    """Width and blocks of the hybrid: `full`, or those of QUICK."""
    return (QUICK["model.dim"], QUICK["model.layers"]) if options.quick else full


def one_of(choices, text: str, flag: str) -> list[str]:
    """The names of a comma-separated list, each once, in the case they have in choices.

    Raises:
        InputError: a name is none of them.
    """
    known = {name.lower(): name for name in choices}
    for name in text.split(","):
        if name.lower() not in known:
            raise InputError(f"{flag}={name} must be of {', '.join(choices)}")
    return [*dict.fromkeys(known[name.lower()] for name in text.split(","))]


def refuse(message: str):
    """For argparse: a wrong flag as an InputError."""
    raise InputError(message.replace("argument ", "", 1))
