"""A run of several processes, on one host or many, joined by JAX's distributed runtime.

All processes run the same program in step: each reads its own rows of the data, and what they
decide (stops, evaluations, rewinds) follows from numbers that are equal on all. Process 0 alone
holds the run's lock and writes its files and the screen; the others write theirs to a temporary
folder, so that no other line asks which process it runs in. Checkpoints are written by all.

A process that ends with an error tells the others its line. One that dies without a word is missed
by the runtime after parallel.host_timeout seconds. Either way the others end too, in one line.
"""

import collections
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import threading
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

from gt_jax.config import Config, Parallel, flatten, to_dict
from gt_jax.errors import InputError, one_line
from gt_jax.training import lock

_FOREVER = 10**11  # milliseconds, 3 years: a process that is gone ends the others by other means
_OF_A_PROCESS = ("parallel.coordinator_address", "parallel.process_id")  # differ within a run
_READ_BACK = ("metrics.jsonl", "samples.txt")  # files that a resumed run reads
_LATE = 60  # seconds that the runtime, which aborts with a stack trace, waits longer than we do

_turns = itertools.count()  # of messages: every process makes the same calls in the same order
_names: list[str] = []  # of the processes, by number


def count() -> int:
    """Processes of the run; starts no backend."""
    return global_state.num_processes


def number() -> int:
    """Of this process, from 0."""
    return global_state.process_id


def is_first() -> bool:
    """Whether this process writes the run's files and the screen."""
    return number() == 0


@contextlib.contextmanager
def joined(parallel: Parallel) -> Iterator[None]:
    """Join the other processes of a run, if the config or the environment says that there are any.

    The runtime stays: a process joins once. While the context lasts, the end of any process ends
    all; an InputError or OSError that leaves it is told to the others.

    Raises:
        InputError: what is set says not enough, or the coordinator cannot listen at its address.
    """
    if global_state.client is None:
        _join(parallel)
    if count() == 1:
        yield
        return
    if parallel.mode == "pmap":
        raise InputError(
            f"parallel.mode=pmap trains in one process and there are {count()}; set it to jit"
        )
    run = f"gt_jax/run/{next(_turns)}"
    _names[:] = gather(f"process {number()} on {socket.gethostname()}")
    over = threading.Event()
    watches = [
        threading.Thread(target=watch, args=(run, over), daemon=True)
        for watch in (_watch_processes, _watch_errors)
    ]
    for thread in watches:
        thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # likely because another process is gone
            time.sleep(parallel.host_timeout + _LATE)  # until `_watch_processes` ends this one
        _tell(run, error, over)
        raise
    except Exception as error:
        _tell(run, error, over)
        raise
    # Python's end must not find the threads inside of the runtime.
    _client().wait_at_barrier(f"{run}/{not is_first()}", _FOREVER)
    if is_first():
        _client().key_value_set(f"{run}/error", "")
    for thread in watches:
        thread.join()


def _tell(run: str, error: Exception, over: threading.Event) -> None:
    """Let the other processes know why this one ends."""
    over.set()
    line = f"{_names[number()]} ended: {one_line(error)}"
    with contextlib.suppress(Exception):  # another process was first, or the runtime is gone
        _client().key_value_set(f"{run}/error", line)
    _linger()


def _client() -> Any:
    return global_state.client


def _join(parallel: Parallel) -> None:
    """Start JAX's distributed runtime where the config or the environment asks for it."""
    address = parallel.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address:
        if parallel.num_processes > 1:
            raise InputError(
                f"parallel.num_processes={parallel.num_processes} needs "
                "parallel.coordinator_address: HOST:PORT of process 0, or auto"
            )
        return
    known: dict[str, Any] = {}
    if address != "auto":
        known = {
            "coordinator_address": _check_address(address),
            "num_processes": _number("num_processes", parallel.num_processes, unset=0),
            "process_id": _number("process_id", parallel.process_id, unset=-1),
            "cluster_detection_method": "deactivate",  # it would leave one GPU to each process
        }
        if not known["process_id"] < known["num_processes"]:
            raise InputError(
                f"parallel.process_id={known['process_id']} must be below "
                f"parallel.num_processes={known['num_processes']}"
            )
        if known["num_processes"] == 1:
            return
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM; see `Vote`
    seconds = round(parallel.host_timeout)
    timer = threading.Timer(seconds, _give_up, (known, address, seconds))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=seconds + _LATE,
            heartbeat_timeout_seconds=seconds,
        )
    except (ValueError, RuntimeError) as error:  # of JAX, for all that it finds
        if address == "auto":
            fix = "JAX detects no cluster here; set HOST:PORT with num_processes and process_id"
        else:
            fix = "is its port free, and has nothing computed before?"
        said = f"parallel.coordinator_address={address}: {one_line(error)}; {fix}"
        raise InputError(said) from error
    finally:
        timer.cancel()


def _check_address(address: str) -> str:
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"parallel.coordinator_address={address} must be HOST:PORT, for example 10.0.0.1:8476, "
            "or auto for a cluster that JAX detects"
        )
    return address


def _number(field: str, value: int, unset: int) -> int:
    """A field, else the environment's JAX_FIELD."""
    name = f"JAX_{field.upper()}"
    text = str(value) if value != unset else os.environ.get(name, "")
    if not text.isdigit():
        raise InputError(
            f"parallel.{field} is not set (nor {name}): parallel.coordinator_address needs it"
        )
    return int(text)


def _give_up(known: dict, address: str, seconds: int) -> None:
    """Not all processes are there in time: end, before the runtime does without a clear word."""
    name, _, port = known.get("coordinator_address", "").rpartition(":")
    reason = f"not all processes joined at {address}"
    if known.get("process_id"):
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            reason = f"process 0 does not answer at {address} ({one_line(error.strerror or error)})"
    _end(
        f"{reason} within parallel.host_timeout={seconds} s; start all "
        f"{known.get('num_processes', '')} processes, and look at address, port and firewall"
    )


def _watch_processes(run: str, over: threading.Event) -> None:
    """End this process when the runtime finds that another one is gone.

    It then fails every barrier. Process 0 waits at one that the others come to at the end of the
    run, and they at one that process 0 comes to.
    """
    try:
        _client().wait_at_barrier(f"{run}/{is_first()}", _FOREVER)
    except Exception as error:
        if over.is_set():  # this one ends by itself
            return
        found = re.search(r"[Tt]ask:? ?(\d+) heartbeat", str(error))
        gone = int(found[1]) if found else 0 if "leader" in str(error) else None
        named = "another process" if gone is None else _names[gone]
        _end(f"{named} no longer answers; start all processes again to resume")


def _watch_errors(run: str, over: threading.Event) -> None:
    """End this process when another one says that it ended with an error."""
    with contextlib.suppress(Exception):  # the runtime is gone: see `_watch_processes`
        line = _client().blocking_key_value_get(f"{run}/error", _FOREVER)
        if line and not over.is_set():
            _linger()
            _end(line)


def _linger() -> None:
    """Process 0 takes the runtime with it: let the others read what there is, and leave."""
    if is_first():
        time.sleep(2)


def _end(line: str) -> None:
    """Leave at once: the main thread may wait for a device that waits for another process."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {line}\n".encode())
    os._exit(1)


def gather(text: str) -> list[str]:
    """What every process says, in their order; all wait for it."""
    turn = f"gt_jax/{next(_turns)}"
    _client().key_value_set(f"{turn}/{number()}", text)
    return [_client().blocking_key_value_get(f"{turn}/{i}", _FOREVER) for i in range(count())]


def of_first(find: Callable[[], Any]) -> Any:
    """What `find` returns in process 0, to all: a value that JSON can hold, of less than 1 MB."""
    if count() == 1:
        return find()
    turn = f"gt_jax/{next(_turns)}"
    if is_first():
        value = find()
        _client().key_value_set(turn, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(turn, _FOREVER))


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
    for name, other in zip(_names, said):
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
