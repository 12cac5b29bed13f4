"""Compiled programs of a command, kept whole: the next process neither traces nor lowers them.

JAX's own cache finds a program by its lowered form, so every process traces and lowers it first,
seconds of Python. Here a program is found by all that tracing can see:

    FOLDER/KEY   a line of JSON (checksum, every imported file as it was), then the program

KEY is a hash of what the caller says that the program is made of, and of versions, devices, the
environment, JAX's settings and the names of the files that were imported or read by then. A file
counts only while all files that were imported when it was written are as they were, and nothing
else is imported. Numbers that tracing finds are kept likewise.

It is for a command that runs as `python -m` or by the script that was installed for it, whose code
is files, on one device; never for a notebook or a library, where a function may be replaced in
memory.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from gt_jax import code_files
from gt_jax.launch import runs

MOST_BYTES = 2**30  # of all kept programs; the least recently used go first
# Environment variables that are of a shell, a terminal, a login or a job. All others count. Which
# devices are visible is told by the devices.
_OF_A_SESSION = {"_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLUMNS", "LINES", "DISPLAY", "HOSTNAME"}
_OF_A_SESSION |= {"MAIL", "PS1", "STY", "WINDOWID", "INVOCATION_ID", "JOURNAL_STREAM"}
_OF_A_SESSION |= {"CUDA_VISIBLE_DEVICES"}
_OF_A_SESSION_BEGIN = ("SSH_", "TMUX", "SLURM_", "XDG_", "VSCODE_", "TERM_")
# Of these, what tells the jobs of one script apart, by which its code may choose what to be.
_OF_A_JOB = {"SLURM_ARRAY_TASK_ID", "SLURM_JOB_NAME", "SLURM_PROCID", "SLURM_LOCALID"}
_OF_THE_SYSTEM = ("/proc/", "/sys/")  # files that say what a machine does now
# Settings of JAX that say where its cache is, and change no program.
_OF_THE_CACHE = ("compilation_cache", "persistent_cache")
# Calls out of XLA that a process can make which has lowered nothing: of what `import jax` registers
# for a GPU, what our programs use. LAPACK's functions on a CPU are found while lowering.
_CALLS = {
    "cpu": ("LayoutConstraint",),
    "gpu": ("LayoutConstraint", "mosaic_gpu_v2", "cusolver_", "cu_threefry2x32"),
}


class _Command(NamedTuple):
    folder: Path
    read: set[str]  # files that nothing imports: the config, what it and the model's code read
    first: list[str]  # all files of then
    environment: dict[str, Any]  # as the process was given it; imports change it
    stamps: dict[str, str]  # of files, each as it was first seen
    began: float  # when the process did


class Kept(NamedTuple):
    """Where a program is kept or to be kept, and the program: None if it must be compiled."""

    path: Path
    program: Future


_command: _Command | None = None
_from_disk = threading.local()  # count: programs that this thread took from JAX's cache


def begin(command: str, cache: Path | None, *read: str | Path) -> None:
    """Keep the programs of this process, if it runs COMMAND, for the next one like it.

    It does as `python -m gt_jax.train`, `python -m gt_jax train` or the installed `gt-jax train`.
    Call it before anything is traced.

    Args:
        command: for example "gt_jax.train".
        cache: the folder of JAX's cache if it is ours, else None: then nothing is kept.
        *read: files that ran without being imported, or were read: of `code_files.reading`.
    """
    global _command
    began, spec = code_files.process_start(), importlib.util.find_spec(command)
    if cache is None or began is None or spec is None or not spec.origin or not runs(command):
        _command = None
        return
    _listen()
    files = {os.path.abspath(file) for file in (spec.origin, *read)}
    first = sorted(code_files.imported(files))
    _command = _Command(cache / "programs", files, first, dict(os.environ), {}, began)
    code_files.stamps(first, _command.stamps)


def find(names: Iterable[str], identity: Any) -> dict[str, Kept]:
    """Programs that are kept, or to be kept, by name; {} where nothing is kept.

    They are loaded in threads. One that is not there, whose code is not as it was, that is damaged
    or not the user's alone, must be compiled.

    Args:
        names: of the programs; the one that takes longest to load first.
        identity: all that they depend on besides code, as what repr() tells apart: configs, shapes,
            dtypes.
    """
    found = {}
    for name, path in _paths(names, identity).items():
        found[name] = Kept(path, Future())
        threading.Thread(target=_load, args=(found[name], _command), daemon=True).start()
    return found


def numbers(name: str, identity: Any, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """count(), or what it returned in an earlier process, as JSON has it.

    Args:
        name: of what is counted, no program's.
        identity: as of `find`.
        count: finds it by tracing; called where nothing is kept, and then kept.
    """
    path = _paths([name], identity).get(name)
    if path is None or _command is None:
        return count()
    try:
        return json.loads(_whole(path, _command)[1])
    except Exception:  # as of a program
        found = traced(count)
        _store(path, json.dumps(found).encode())
        return found


def traced(trace: Callable, *args: Any) -> Any:
    """trace(*args), noting which files it reads: a model's code may make a table a constant.

    What is kept from now on counts only while these files are as they are.
    """
    with code_files.reading() as read:
        result = trace(*args)
    if _command is not None:
        _command.read.update(file for file in read if not file.startswith(_OF_THE_SYSTEM))
    return result


def _paths(names: Iterable[str], identity: Any) -> dict[str, Path]:
    """The file of each name; none where nothing is kept."""
    if _command is None or jax.device_count() > 1 or jax.default_backend() not in _CALLS:
        return {}
    try:
        environment = _environment(_command)
    except Exception:  # a system that does not say what it is
        return {}
    found = {}
    for name in names:
        said = repr([name, identity, _command.first, environment])
        found[name] = _command.folder / hashlib.sha256(said.encode()).hexdigest()
    return found


def _load(kept: Kept, command: _Command) -> None:
    kept.program.set_result(_program(kept.path, command))


def _program(path: Path, command: _Command) -> jax.stages.Compiled | None:
    """The program in a file of `find`, None if it must be compiled."""
    try:
        header, payload = _whole(path, command)
        if header["calls_mosaic"]:
            import jax.experimental.mosaic.gpu  # noqa: F401  (says where its runtime is)
        return serialize_executable.deserialize_and_load(*pickle.loads(payload))
    except Exception:  # of many kinds; it is compiled anew
        return None


def _whole(path: Path, command: _Command) -> tuple[dict[str, Any], bytes]:
    """The two parts of a file that counts; it is the one used last now.

    Raises:
        OSError, ValueError, KeyError: as of `_read`, or what it is made of is not as it was.
    """
    header, payload = _read(path)
    known = header["files"]
    same = known == code_files.stamps(known, command.stamps)
    if not same or not known.keys() >= code_files.imported(command.read):
        raise ValueError(f"{path} is of other code")
    if [header["key"], header["checksum"]] != [path.name, hashlib.sha256(payload).hexdigest()]:
        raise ValueError(f"{path} is damaged")
    with contextlib.suppress(OSError):  # a disk that nobody writes
        os.utime(path)
    return header, payload


def compile_and_keep(
    kept: Kept, lowered: jax.stages.Lowered, calls: Iterable[str], use: Callable
) -> None:
    """Compile, call use(compiled), then keep it if a process that has lowered nothing can run it.

    What JAX takes from its own cache is not kept: written a second time on a CPU, it ends the run
    that loads it.

    Args:
        kept: of `find`.
        lowered: the program.
        calls: the names of what it calls outside of XLA.
    """
    before = getattr(_from_disk, "count", 0)
    compiled = lowered.compile()
    is_new = getattr(_from_disk, "count", 0) == before
    use(compiled)
    if is_new:
        _keep(kept, calls, compiled)


def _keep(kept: Kept, calls: Iterable[str], compiled: jax.stages.Compiled) -> None:
    """Write the file of a program, unless it calls what only lowering sets up."""
    if not all(call.startswith(_CALLS[jax.default_backend()]) for call in calls):
        return
    with contextlib.suppress(Exception):  # it cannot be written
        payload = pickle.dumps(serialize_executable.serialize(compiled))
        _store(kept.path, payload, calls_mosaic=any(x.startswith("mosaic") for x in calls))


def _store(path: Path, payload: bytes, **about: Any) -> None:
    """Write a file, unless one of the code has changed since this process began, which may have
    imported the old one. Where there is no room or no right to write, nothing is kept."""
    with contextlib.suppress(Exception):
        assert _command is not None, "`find` found something"
        stamps = code_files.stamps(code_files.imported(_command.read), _command.stamps)
        if "" in stamps.values() or code_files.newest_change(stamps) >= _command.began:
            return
        checksum = hashlib.sha256(payload).hexdigest()
        header = {"key": path.name, "checksum": checksum, "files": stamps, **about}
        _write(path, json.dumps(header).encode() + b"\n" + payload)
        _drop_oldest(path.parent)


@functools.cache
def _listen() -> None:
    def count(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _from_disk.count = getattr(_from_disk, "count", 0) + 1

    jax.monitoring.register_event_listener(count)


def _environment(command: _Command) -> dict[str, Any]:
    """What decides, besides code and identity, which program XLA makes and whether it runs."""
    devices = jax.devices()
    return {
        "python": [sys.version, sys.path, str(sys.flags), sys._xoptions],
        "jax": [jax.__version__, jaxlib.version.__version__, devices[0].client.platform_version],
        "devices": [(d.id, d.platform, d.device_kind) for d in devices],
        "host": _host() if devices[0].platform == "cpu" else _libraries(),
        "variables": {
            name: value
            for name, value in sorted(command.environment.items())
            if name in _OF_A_JOB
            or (name not in _OF_A_SESSION and not name.startswith(_OF_A_SESSION_BEGIN))
        },
        "settings": {
            name: repr(value)
            for name, value in sorted(jax.config.values.items())
            if not any(word in name for word in _OF_THE_CACHE)
        },
    }


@functools.cache
def _host() -> list[Any]:
    """The CPU, for whose kind and number of cores XLA compiles: a home may be of several hosts."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))}
    return [os.cpu_count(), len(os.sched_getaffinity(0)), sorted(told)]


def _libraries() -> list[str]:
    """NVIDIA's libraries and driver: XLA chooses among what they have."""
    found = {file.name for path in sys.path for file in Path(path).glob("nvidia*.dist-info")}
    with contextlib.suppress(OSError):
        found.add(Path("/proc/driver/nvidia/version").read_text())
    return sorted(found)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The two parts of a file that nobody but this user can have written.

    Raises:
        OSError: it is not there, or others may write it: loading a program runs what is in it.
        ValueError: it is damaged.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} was not written here")
    with path.open("rb") as file:
        for about in (os.fstat(file.fileno()), os.stat(path.parent)):
            if about.st_uid != os.getuid() or about.st_mode & 0o022:
                raise PermissionError(f"{path} is not this user's alone")
        return json.loads(file.readline()), file.read()


def _write(path: Path, data: bytes) -> None:
    """Write a file so that another process sees the whole of it or nothing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _drop_oldest(folder: Path) -> None:
    """Delete the files used longest ago until all together have MOST_BYTES."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process does the same
            found.append((file.lstat(), file))
    total = 0
    for about, file in sorted(found, key=lambda x: -x[0].st_mtime):
        total += about.st_size
        if total > MOST_BYTES:
            with contextlib.suppress(OSError):  # or a folder, of somebody else
                file.unlink()
