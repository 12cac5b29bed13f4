"""What the command-line programs share: absl flags of their own, and errors in one line."""

import logging
import sys
import warnings

from absl import flags as absl_flags
from ml_collections import config_flags

from gt_jax.config import default_config, flatten
from gt_jax.config_files import load_config
from gt_jax.errors import InputError, did_you_mean


def run(main) -> None:
    """Call main(sys.argv); a mistake in the input prints as `error: ...` with exit status 1."""
    verbose = any(argument.startswith("--verbose") for argument in sys.argv)
    if not verbose:  # Orbax logs a failure before raising it, and its threads complain after.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = lambda _: None
    try:
        status = main(sys.argv)
    except (InputError, OSError) as error:
        if verbose:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        status = 1
    sys.exit(status)


def new_flags() -> absl_flags.FlagValues:
    """An empty set of flags plus --verbose and --help, independent of absl's global one."""
    flags = absl_flags.FlagValues()
    absl_flags.DEFINE_bool("verbose", False, "Show tracebacks of errors.", flag_values=flags)
    absl_flags.DEFINE_bool("help", False, "Show this help.", flag_values=flags)
    return flags


def parse(flags: absl_flags.FlagValues, argv, *, usage: str, required=()) -> bool:
    """Parse argv into flags. Returns False when --help was asked for and has been printed.

    Raises:
        InputError: unknown flag or argument, value of the wrong type, a required flag missing.
    """
    try:
        rest = flags(argv)[1:]
    except absl_flags.Error as error:
        raise InputError(str(error)) from error
    except (AttributeError, KeyError) as error:
        raise InputError(_unknown_field(argv) or str(error)) from error
    if flags.help:
        print(usage.strip(), flags.get_help(), sep="\n")
        return False
    if rest:
        raise InputError(f"{rest[0]} is not a flag; flags are written --name=value")
    for name in required:
        if not flags[name].present:
            raise InputError(f"--{name} is missing; see --help")
    return True


def define_config(flags: absl_flags.FlagValues, argv: list[str]) -> str | None:
    """Add --config.group.field=value flags for every setting, from the file that argv names.

    `--config=NAME` itself is taken out of argv. Naming a config file runs it: it is Python.

    Returns:
        The name, or None where argv has none: the flags then start from the defaults.

    Raises:
        InputError: the file is not to be had, does not run, or returns something else.
    """
    name = None
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            name, argv[i : i + 2] = argv[i + 1], []
            break
        if argument.startswith("--config="):
            name, argv[i : i + 1] = argument.removeprefix("--config="), []
            break
    config = default_config() if name is None else load_config(name)
    config_flags.DEFINE_config_dict("config", config, flag_values=flags)
    return name


def _unknown_field(argv) -> str | None:
    """Name the override whose field does not exist; ml_collections' own error drops its group."""
    without_overrides = [a for a in argv if not a.startswith("--config.")]
    flags = new_flags()
    define_config(flags, without_overrides)
    flags(without_overrides, known_only=True)
    known = flatten(flags.config.to_dict())
    for argument in argv:
        name = argument.split("=", 1)[0].removeprefix("--config.")
        if argument.startswith("--config.") and name not in known:
            mend = did_you_mean(name, known) or "; configs/base.py has them all"
            return f"{name} is not a config field{mend}"
    return None
