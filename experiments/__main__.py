"""Several experiments in one process, where one compiles while another runs.

    python -m experiments fusion ratio --seeds=5

Flags come after the names and go to every one of them.
"""

import importlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import results
from gt_jax.errors import InputError, did_you_mean


def main(argv):
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip(), f"There are {', '.join(experiments())}.", sep="\n\n")
        print("What flags one takes: `python -m experiments NAME --help`.")
        return
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    known = experiments()
    for name in names or [""]:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise InputError(f"{name!r} is no experiment{hint}")
    if len(names) > 1 and any(argument.startswith("--out") for argument in argv):
        raise InputError("--out is for one experiment: each of these would write over the others'")
    began = time.perf_counter()
    mains = [importlib.import_module(f"experiments.{name}").main for name in names]
    with ThreadPoolExecutor(len(mains)) as pool:
        for done in [pool.submit(main, argv[len(names) :]) for main in mains]:
            done.result()
    print(f"{', '.join(names)}: {time.perf_counter() - began:.0f} s")


def experiments():
    """Names of the files beside this one that take the laboratory's flags."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    takes_flags = lambda text: "\ndef main(" in text and "= results.parser(" in text
    return [file.stem for file in files if takes_flags(file.read_text("utf-8"))]


if __name__ == "__main__":
    results.run(main)
