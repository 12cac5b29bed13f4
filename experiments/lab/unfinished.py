"""What an interrupted experiment had measured, kept until its result is written.

    RESULT.HASH.unfinished          beside RESULT.json; HASH is of all that numbers depend on
    RESULT.HASH.HASH.unfinished     how far a program of some arms is; the second HASH is of these

so that another command, a trial with --quick for example, neither finds nor removes it.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import gt_jax
from experiments.lab import results

SECONDS = 30  # between two writings of a program's state, which takes about one


class Kept:
    """Measures of arms, in a file beside the result that is to come.

    Only what the same flags, code, JAX and device measured of the same config and text is found
    again, wherever the file and the text lie by then and whatever else was committed meanwhile.

    Attributes:
        measured: arm -> name -> [seeds] float64.
    """

    def __init__(self, options, configs: Mapping[str, str], text: str):
        """Find what is kept.

        Args:
            options: of lab/command.py.
            configs: arm -> its config as text, without data.source.
            text: hash of what the arms train on.
        """
        self._configs = dict(configs)
        shared = {name: str(getattr(options, name)) for name in ("seeds", "impl", "quick")}
        origin = {name: value for name, value in results.origin().items() if name != "commit"}
        self._of = shared | origin | {"code": _code(), "text": text}
        name = hashlib.sha256(json.dumps(self._of).encode()).hexdigest()[:12]
        result = results.path_of(options)
        self.path = result.with_name(f"{result.name.removesuffix('.json')}.{name}.unfinished")
        self._lock = threading.Lock()
        self.measured = {
            arm: measures for arm, (config, measures) in self._read() if config == configs.get(arm)
        }
        if self.measured:
            print(f"kept from before in {self.path}: {', '.join(self.measured)}", flush=True)

    def add(self, arm: str, measures: Mapping) -> None:
        """Keep the measures of one more arm, name -> [seeds]."""
        with self._lock:
            self.measured[arm] = _arrays(measures)
            arms = {
                arm: {
                    "config": self._configs[arm],
                    "measures": {name: values.tolist() for name, values in each.items()},
                }
                for arm, each in self.measured.items()
            }
            with _replaced(self.path) as written:
                written.write_text(json.dumps({"of": self._of, "arms": arms}) + "\n", "utf-8")

    def place(self, arms: Sequence[str], *runs) -> "Place":
        """Where the state of a program is kept while it trains.

        Args:
            arms: that it trains.
            runs: which of their runs, for JSON.
        """
        of = [self._of, {arm: self._configs[arm] for arm in arms}, runs]
        name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
        return Place(self.path.with_name(f"{self.path.stem}.{name}.unfinished"))

    def forget(self) -> None:
        """Remove the file, once the result is written."""
        self.path.unlink(missing_ok=True)

    def _read(self):
        """[(arm, (config, measures))] of the file; nothing if it is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(self.path.read_text("utf-8"))
            if found["of"] == self._of:
                return [
                    (arm, (each["config"], _arrays(each["measures"])))
                    for arm, each in found["arms"].items()
                ]
        return []


class Place:
    """A file of arrays that say how far a program's training is."""

    def __init__(self, path: Path):
        self.path, self._last = path, time.monotonic()

    def due(self) -> bool:
        """Whether SECONDS have passed since the last writing, or since there is this object."""
        return time.monotonic() - self._last >= SECONDS

    def save(self, about: Mapping, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace what was saved; about is plain, for JSON.

        Raises:
            OSError: the file cannot be written.
        """
        with _replaced(self.path) as written, written.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)
        self._last = time.monotonic()

    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """What `save` was given; None where there is nothing, or nothing whole.

        Types that NumPy does not have, as bfloat16, come back as bytes of their size.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(self.path) as found:
                arrays = dict(found)
            return json.loads(str(arrays.pop("about"))), arrays
        return None

    def forget(self) -> None:
        """Remove the file, once what was trained is measured."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _replaced(path: Path):
    """A file to write, which then takes the place of another: whoever reads finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield written
    except BaseException:  # an interruption leaves no part of gigabytes behind
        written.unlink(missing_ok=True)
        raise
    os.replace(written, path)


def _arrays(measures: Mapping) -> dict[str, np.ndarray]:
    return {name: np.array(values, float) for name, values in measures.items()}


@functools.cache
def _code() -> str:
    """Hash of the Python files of the experiments and of gt_jax, committed or not."""
    sums = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(gt_jax.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            sums.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return sums.hexdigest()
