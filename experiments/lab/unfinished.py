"""What an interrupted experiment had measured, kept until its result is written."""

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.lab import results


class Kept:
    """Measures of arms, in a file beside the result that is to come.

    Only what the same flags, build, JAX and device measured of the same config is found again.

    Attributes:
        measured: arm -> name -> [seeds] float64.
    """

    def __init__(self, options, configs: Mapping[str, str]):
        """Find what is kept.

        Args:
            options: of lab/command.py.
            configs: arm -> its config as text.
        """
        self._path = path_of(options)
        self._configs = dict(configs)
        shared = {
            name: str(getattr(options, name)) for name in ("seeds", "source", "impl", "quick")
        }
        self._of = shared | results.origin()
        self._lock = threading.Lock()
        self.measured = {
            arm: {name: np.array(values, float) for name, values in each["measures"].items()}
            for arm, each in self._read().items()
            if each["config"] == configs.get(arm)
        }
        if self.measured:
            print(f"kept from before in {self._path}: {', '.join(self.measured)}", flush=True)

    def add(self, arm: str, measures: Mapping) -> None:
        """Keep the measures of one more arm, name -> [seeds]."""
        with self._lock:
            self.measured[arm] = {name: np.array(v, float) for name, v in measures.items()}
            arms = {
                arm: {
                    "config": self._configs[arm],
                    "measures": {name: values.tolist() for name, values in each.items()},
                }
                for arm, each in self.measured.items()
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_name(f"{self._path.name}.tmp")
            written.write_text(json.dumps({"of": self._of, "arms": arms}) + "\n", "utf-8")
            os.replace(written, self._path)

    def _read(self):
        """What the file says of arms, nothing if it is of another build or damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._path.read_text("utf-8"))
            if found["of"] == self._of:
                return found["arms"]
        return {}


def path_of(options) -> Path:
    """Where the measures of an unfinished experiment are kept."""
    return results.path_of(options).with_suffix(".unfinished")


def forget(options) -> None:
    """Remove what is kept, once the result is written."""
    path_of(options).unlink(missing_ok=True)
