"""A run of several processes, on one host or many, joined by JAX's distributed runtime.

All processes run the same program in step: each reads its own rows of the data, and what they
decide (stops, evaluations, rewinds) follows from numbers that are equal on all. Process 0 alone
holds the run's lock and writes its files and the screen; the others write theirs to a temporary
folder, so that no other line asks which process it runs in. Checkpoints are written by all.

`gt_jax.training.runtime` starts them together and ends them together.
"""

import collections
import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # public are only start and end of the runtime
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gt_jax.config import Config, flatten, to_dict
from gt_jax.errors import InputError
from gt_jax.training import lock

FOREVER = 10**11  # milliseconds, 3 years: a process that is gone ends the others by other means
_OF_A_PROCESS = ("parallel.coordinator_address", "parallel.process_id")  # differ within a run
_READ_BACK = ("metrics.jsonl", "samples.txt")  # files that a resumed run reads

_turns = itertools.count()  # of messages: every process makes the same calls in the same order
names: list[str] = []  # of the processes, by number


def next_turn() -> int:
    """A number for a message, the same in all processes."""
    return next(_turns)


def count() -> int:
    """Processes of the run; starts no backend."""
    return global_state.num_processes


def number() -> int:
    """Of this process, from 0."""
    return global_state.process_id


def is_first() -> bool:
    """Whether this process writes the run's files and the screen."""
    return number() == 0


def client() -> Any:
    """Of the runtime's service for short texts and barriers; None in a single process."""
    return global_state.client


def gather(text: str) -> list[str]:
    """What every process says, in their order; all wait for it."""
    turn = f"gt_jax/{next_turn()}"
    client().key_value_set(f"{turn}/{number()}", text)
    return [client().blocking_key_value_get(f"{turn}/{i}", FOREVER) for i in range(count())]


def of_first(find: Callable[[], Any]) -> Any:
    """What `find` returns in process 0, to all: a value that JSON can hold, of less than 1 MB."""
    if count() == 1:
        return find()
    turn = f"gt_jax/{next_turn()}"
    if is_first():
        value = find()
        client().key_value_set(turn, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(turn, FOREVER))


def first_before_others(make: Callable[[], Any]) -> Any:
    """What `make` returns in each process; the others call it when process 0 has done so."""
    made = make() if is_first() else None
    of_first(lambda: None)
    return made if is_first() else make()


def check_alike(what: str, value: Any) -> None:
    """Raise InputError unless all processes have the same value, which JSON can hold.

    Args:
        what: it is, for the message; of a dict the first key that differs is named instead.
        value: of this process.
    """
    if count() == 1:
        return
    said = [json.loads(text) for text in gather(json.dumps(value))]
    for name, other in zip(names, said):
        if other == said[0]:
            continue
        if isinstance(other, dict):
            what = next(key for key in other if other[key] != said[0].get(key))
            other, said[0] = other[what], said[0].get(what)
        raise InputError(
            f"{what}={other} in {name} differs from {said[0]} in process 0; give all processes the "
            "same"
        )


def check_same_config(config: Config) -> None:
    """Raise InputError unless all processes were given the same settings."""
    settings = flatten(to_dict(config))
    check_alike("config", {k: v for k, v in settings.items() if k not in _OF_A_PROCESS})


@contextlib.contextmanager
def folder(workdir: Path) -> Iterator[Path]:
    """Where this process writes the files of a run: in process 0 its folder, with the run's lock.

    The others get a temporary folder, with copies of what a resumed run reads back.

    Raises:
        InputError: another run holds the lock, or the processes do not share the folder.
    """
    if is_first():
        with lock.hold(workdir):
            of_first((workdir / "lock").read_text)
            yield workdir
        return
    held = of_first(str)
    if not _appears(workdir / "lock", held):
        raise InputError(
            f"--workdir={workdir} is not the folder of process 0: put it where all hosts see the "
            "same files"
        )
    with tempfile.TemporaryDirectory(prefix="gt_jax-") as own:
        for name in _READ_BACK:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(workdir / name, own)
        yield Path(own)


def _appears(file: Path, text: str, seconds: float = 30) -> bool:
    """Whether a file has a text now or soon: network file systems show changes late."""
    for _ in range(max(int(seconds * 10), 1)):
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return True
        time.sleep(0.1)
    return False


class Vote:
    """Whether any process wants something, asked by all at the same places.

    The answer is about the vote before the last but one, so that the device never waits for the
    host. It is a sum over devices, and so the same in all processes at the same place.
    """

    def __init__(self, mesh: Mesh):
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
        self._sums = collections.deque()
        # XLA's CPU backend may run two programs at once, whose sums then wait for each other.
        self._ahead = 0 if jax.default_backend() == "cpu" else 2

    def __call__(self, wanted: bool) -> bool:
        ask = lambda index: np.full(1, wanted, np.int32)
        votes = jax.make_array_from_callback((self._size,), self._rows, ask)
        self._sums.append(self._add(votes))
        return len(self._sums) > self._ahead and int(self._sums.popleft()) > 0
