"""What the command-line programs share: absl flags of their own, and errors in one line."""

import logging
import sys
import warnings

from absl import flags as absl_flags
from ml_collections import config_flags

from gt_jax import compilation
from gt_jax.config import flatten
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
    """Flags that every program has: --compile_cache, --verbose, --help; none of absl's own."""
    flags = absl_flags.FlagValues()
    cache = f"Folder of compiled programs (auto: {compilation.default_cache()}), or none."
    absl_flags.DEFINE_string("compile_cache", "auto", cache, flag_values=flags)
    absl_flags.DEFINE_bool("verbose", False, "Show tracebacks of errors.", flag_values=flags)
    absl_flags.DEFINE_bool("help", False, "Show this help.", flag_values=flags)
    return flags


def parse(flags: absl_flags.FlagValues, argv, *, usage: str, required=()) -> bool:
    """Parse argv into flags and do what those of every program say.

    Returns False when --help was asked for and has been printed.

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
    compilation.use_cache(flags.compile_cache)
    return True


def define_config(flags: absl_flags.FlagValues, argv) -> None:
    """Add --config=FILE with its --config.group.field=value overrides."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/gf_mh.py.", sys_argv=argv, flag_values=flags
    )


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
