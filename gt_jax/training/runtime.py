"""The processes of a run begin together, and none outlives another one that failed.

A process that ends with an error tells the others its line. One that dies without a word is missed
after parallel.host_timeout seconds. Either way the others end too, in one line.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from gt_jax.config import Parallel
from gt_jax.errors import InputError, one_line
from gt_jax.training import hosts

_LATE = 60  # seconds that the runtime, which aborts with a stack trace, waits longer than we do


@contextlib.contextmanager
def joined(parallel: Parallel) -> Iterator[None]:
    """Join the other processes of a run, if the config or the environment says that there are any.

    The runtime stays: a process joins once. While the context lasts, the end of any process ends
    all; an InputError or OSError that leaves it is told to the others.

    Raises:
        InputError: what is set says not enough, or the coordinator cannot listen at its address.
    """
    if hosts.client() is None:
        _join(parallel)
    if hosts.count() == 1:
        yield
        return
    if parallel.mode == "pmap":
        raise InputError(
            f"parallel.mode=pmap trains in one process and there are {hosts.count()}; set it to jit"
        )
    run = f"gt_jax/run/{hosts.next_turn()}"
    hosts.names[:] = hosts.gather(f"process {hosts.number()} on {socket.gethostname()}")
    ends, fails = threading.Event(), threading.Event()
    watches = [
        threading.Thread(target=_beat, args=(run, parallel.host_timeout, ends, fails), daemon=True),
        threading.Thread(target=_watch_errors, args=(run, fails), daemon=True),
    ]
    for thread in watches:
        thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # likely because another process is gone
            time.sleep(parallel.host_timeout + _LATE)  # until `_beat` ends this one
        _tell(run, error, fails)
        raise
    except Exception as error:
        _tell(run, error, fails)
        raise
    # Python's end must not find the threads inside of the runtime.
    hosts.client().wait_at_barrier(f"{run}/end", hosts.FOREVER)
    ends.set()
    if hosts.is_first():
        hosts.client().key_value_set(f"{run}/error", "")
    for thread in watches:
        thread.join()


def _tell(run: str, error: Exception, fails: threading.Event) -> None:
    """Let the other processes know why this one ends."""
    fails.set()
    line = f"{hosts.names[hosts.number()]} ended: {one_line(error)}"
    with contextlib.suppress(Exception):  # another process was first, or the runtime is gone
        hosts.client().key_value_set(f"{run}/error", line)
    _linger()


def _join(parallel: Parallel) -> None:
    """Start JAX's distributed runtime where the config or the environment asks for it."""
    address = parallel.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address:
        given = f"parallel.num_processes={parallel.num_processes}"
        alone = parallel.num_processes <= 1
        if parallel.num_processes == 0 and "JAX_NUM_PROCESSES" in os.environ:
            given = f"JAX_NUM_PROCESSES={os.environ['JAX_NUM_PROCESSES']}"
            alone = os.environ["JAX_NUM_PROCESSES"] in ("", "0", "1")
        if not alone:
            raise InputError(
                f"{given} needs parallel.coordinator_address (or JAX_COORDINATOR_ADDRESS): "
                "HOST:PORT of process 0, or auto"
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
            heartbeat_timeout_seconds=seconds + _LATE,
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


def _beat(run: str, seconds: float, ends: threading.Event, fails: threading.Event) -> None:
    """Come to a barrier with all processes, again and again; end where one of them does not.

    The runtime would notice that, too, but it aborts without a clear word.
    """
    while True:
        ends.wait(min(seconds / 10, 10))
        if hosts.is_first() and ends.is_set():
            hosts.client().key_value_set(
                f"{run}/last beat", ""
            )  # which all know when it has passed
        try:
            if not fails.is_set():
                hosts.client().wait_at_barrier(f"{run}/beat", round(1000 * seconds))
        except Exception as error:
            if not fails.is_set():
                _end(f"{_gone(str(error))} no longer answers; start all processes again to resume")
        if fails.is_set() or (ends.is_set() and _is_set(f"{run}/last beat")):
            return


def _gone(error: str) -> str:
    """Who it is, by what a barrier says."""
    late = re.search(r"timed out task names:\s*(\d+)|[Tt]ask:? ?(\d+) heartbeat", error)
    if late:
        return hosts.names[int(late[1] or late[2])]
    return hosts.names[0] if "leader" in error else "another process"


def _is_set(key: str) -> bool:
    try:
        hosts.client().key_value_try_get(key)
    except Exception:  # NOT_FOUND
        return False
    return True


def _watch_errors(run: str, fails: threading.Event) -> None:
    """End this process when another one says that it ended with an error."""
    with contextlib.suppress(Exception):  # the runtime is gone: see `_beat`
        line = hosts.client().blocking_key_value_get(f"{run}/error", hosts.FOREVER)
        if line and not fails.is_set():
            _linger()
            _end(line)


def _linger() -> None:
    """Process 0 takes the runtime with it: let the others read what there is, and leave."""
    if hosts.is_first():
        time.sleep(2)


def _end(line: str) -> None:
    """Leave at once: the main thread may wait for a device that waits for another process."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {line}\n".encode())
    os._exit(1)
