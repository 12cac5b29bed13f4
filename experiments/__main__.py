"""The laboratory: questions, benchmarks and the report, each by its name.

    python -m experiments fusion ratio --seeds=5
    python -m experiments kernels --quick

Flags come after the names; NAME --help says which there are. Of questions that take the flags of
the laboratory, several can run in one process: one compiles while another runs, and the flags go to
every one of them.
"""

import ast
import importlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.lab import command
from gt_jax.errors import InputError, did_you_mean

ROOT = Path(__file__).parent


def main(argv):
    known = experiments()
    if argv in ([], ["--help"], ["-h"]):
        print(usage(known))
        return None
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    if names and names[0] in known and not takes_lab_flags(known[names[0]]):
        names = names[:1]  # what follows is for it
    for name in names or [""]:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise InputError(f"{name!r} is no experiment{hint}")
        if len(names) > 1 and not takes_lab_flags(known[name]):
            raise InputError(f"{name} has flags of its own: run it alone")
    flags = argv[len(names) :]
    if len(names) > 1 and any(flag.startswith("--out") for flag in flags):
        raise InputError("--out is for one experiment: each of these would overwrite the others'")
    mains = [importlib.import_module(module(known[name])).main for name in names]
    if len(mains) == 1:
        return mains[0](flags)
    began = time.perf_counter()
    with ThreadPoolExecutor(len(mains)) as pool:
        for done in [pool.submit(main, flags) for main in mains]:
            done.result()
    print(f"{', '.join(names)}: {time.perf_counter() - began:.0f} s")
    return None


def experiments() -> dict[str, Path]:
    """name -> file of everything with a main that takes a command line, questions first."""
    files = [
        *sorted((ROOT / "questions").glob("*.py")),
        *sorted((ROOT / "benchmarks").glob("*.py")),
    ]
    files.append(ROOT / "lab" / "report.py")
    return {file.stem: file for file in files if "\ndef main(argv=None)" in file.read_text("utf-8")}


def takes_lab_flags(file: Path) -> bool:
    """Whether an experiment has the flags of lab/command.py, and no arguments besides."""
    return "= command.parser(" in file.read_text("utf-8")


def module(file: Path) -> str:
    """The dotted name of a file of experiments/."""
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)


def usage(known) -> str:
    """This module's docstring, and what each experiment asks."""
    width = max(map(len, known))
    about = lambda file: ast.get_docstring(ast.parse(file.read_text("utf-8"))).split("\n")[0]
    lines = [f"  {name:{width}}  {about(file)}" for name, file in known.items()]
    return "\n".join([__doc__.strip(), "", *lines])


if __name__ == "__main__":
    command.run(main)
