"""What the command-line programs share: absl flags of their own, and errors in one line."""

import contextlib
import gc
import io
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import config_flags

from gt_jax import compilation
from gt_jax.config import default_config, walk_fields
from gt_jax.config_files import load_config
from gt_jax.errors import InputError, did_you_mean
from gt_jax.starting import raise_at_ctrl_c
from gt_jax.suggestions import suggest_field


def run(main: Callable[[list[str]], int | None], *, leave_threads: bool = False) -> None:
    """Call main(sys.argv) and exit with the status it returns, 0 for None.

    A mistake in the input prints as `error: ...` with exit status 1. Ctrl-C ends with 130 and a
    closed pipe (`| head`) with 141, as shells report them, both without a word. What the console
    cannot show is escaped.

    Args:
        main: takes the command line.
        leave_threads: after an error, do not wait for threads that may still be writing.
    """
    raise_at_ctrl_c()
    gc.freeze()  # what is imported stays: the garbage collector need not look there
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verbose = any(argument.startswith("--verbose") for argument in sys.argv)
    if not verbose:  # Orbax logs a failure before raising it, and its threads complain after.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = lambda _: None
    try:
        sys.exit(_status(main, verbose))
    except BaseException as end:
        failed = not isinstance(end, SystemExit) or end.code == 1
        if not (failed and leave_threads):
            raise
        if not isinstance(end, SystemExit):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


def _status(main, verbose: bool) -> int | None:
    try:
        status = main(sys.argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python flushes at exit, and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError, MemoryError) as error:
        if verbose:
            raise
        said = " ".join(str(error).split())
        if isinstance(error, MemoryError):
            said = f"this machine's memory is full ({said or 'no more'}); lower sizes or batch_size"
        with contextlib.suppress(OSError):
            print("error:", said, file=sys.stderr)
        return 1


def note(text: str) -> None:
    """Print a line beside a program's output, on standard error."""
    print(text, file=sys.stderr, flush=True)


def new_flags() -> absl_flags.FlagValues:
    """Flags that every program has: --compile_cache, --verbose, --help; none of absl's own."""
    flags = absl_flags.FlagValues()
    cache = f"Folder of compiled programs (auto: {compilation.default_cache()}), or none."
    absl_flags.DEFINE_string("compile_cache", "auto", cache, flag_values=flags)
    absl_flags.DEFINE_bool("verbose", False, "Show tracebacks of errors.", flag_values=flags)
    absl_flags.DEFINE_bool("help", False, "Show this help.", flag_values=flags)
    return flags


def parse(
    flags: absl_flags.FlagValues,
    argv: list[str],
    *,
    usage: str | None,
    required: Sequence[str] = (),
) -> bool:
    """Parse argv into flags and do what those of every program say.

    Returns False when --help was asked for and has been printed.

    Raises:
        InputError: unknown flag or argument, value of the wrong type, a required flag missing.
    """
    try:
        rest = flags(argv)[1:]
    except absl_flags.Error as error:
        raise InputError(_unknown_flag(argv, flags) or str(error)) from error
    if flags.help:
        print((usage or "").strip(), end="\n\n")
        if "config" in flags:
            print(describe_settings(), end="\n\n")
        print("flags:")
        for name in sorted(set(flags) - {"config", "flagfile", "undefok"}):
            print("  " + _describe_flag(flags[name]))
        return False
    if rest:
        is_config = "config" in flags and rest[0].endswith(".py")
        hint = (
            f"did you mean --config={rest[0]}?" if is_config else "flags are written --name=value"
        )
        raise InputError(f"{rest[0]} is not a flag; {hint}")
    for name in required:
        if not flags[name].present:
            raise InputError(f"--{name} is missing; see --help")
    compilation.use_cache(flags.compile_cache)
    return True


def define_config(flags: absl_flags.FlagValues, argv: list[str]) -> str:
    """Add --config.group.field=value flags for every setting, from the file that argv names.

    `--config=NAME` itself is taken out of argv. Naming a config file runs it: it is Python.

    Returns:
        The name; "" where --help is asked for instead.

    Raises:
        InputError: --config is missing, or its file does not exist, does not run or returns
            something else.
    """
    name = ""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            name, argv[i : i + 2] = argv[i + 1], []
            break
        if argument.startswith("--config="):
            name, argv[i : i + 1] = argument.removeprefix("--config="), []
            break
    if not name and not {"--help", "--helpfull", "-h"} & set(argv):
        paths = [a for a in argv[1:] if a.endswith(".py") or Path(a).is_file()]
        hint = f"did you mean --config={paths[0]}?" if paths else "see --help"
        raise InputError(f"--config is missing; {hint}")
    config = load_config(name) if name else default_config()
    if unknown := _unknown_field(argv):
        raise InputError(unknown)
    config_flags.DEFINE_config_dict("config", config, flag_values=flags, sys_argv=argv)
    return name


def describe_settings() -> str:
    """Every field of a config with its default and meaning, as --help prints them."""
    lines = ["settings, each with its default; where there is none, the preset or nothing sets it:"]
    for name, field in walk_fields():
        default = "" if field.default is None else field.default
        choices = " | ".join(field.metadata["choices"])
        lines.append(f"  --config.{name}={default}" + (f"  ({choices})" if choices else ""))
        indent = " " * 8
        about = field.metadata["about"]
        lines += textwrap.wrap(about, 96, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _describe_flag(flag: absl_flags.Flag) -> str:
    """A line of --help: the flag with its default, and what it says."""
    unset = flag.default is None or flag.default is False or flag.default == []
    default = "" if unset else f"={flag.default}"
    about = flag.help.split(";\n")[0]  # absl adds how to repeat a flag, which we say ourselves
    return f"--{flag.name}{default}: {about}"


def _unknown_field(argv) -> str | None:
    """Name the override whose field does not exist; ml_collections' own error drops its group."""
    known = [name for name, _ in walk_fields()]
    for argument in argv:
        name = argument.split("=", 1)[0].removeprefix("--config.")
        if argument.startswith("--config.") and name not in known:
            hint = suggest_field(name, known) or "; --help lists them all"
            return f"{name} is not a config field{hint}"
    return None


def _unknown_flag(argv, flags) -> str | None:
    """Name an unknown flag, with the config field it may stand for; None if all are known."""
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=", 1)[0]
        if not argument.startswith("--") or "." in name or not name:
            continue
        if name in flags or name.removeprefix("no") in flags:
            continue
        hint = did_you_mean(name, [f for f in flags if f != "config"])
        if not hint and "config" in flags:
            field = suggest_field(name, [name for name, _ in walk_fields()])
            hint = field.replace("'", "--config.", 1).replace("'", "=...", 1)
        return f"--{name} is not a flag{hint or '; see --help'}"
    return None
