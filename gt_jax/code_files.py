"""The files that a process has its code from: which they are, and whether they are as they were."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import stat
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

_LARGE = 2**26  # bytes of a file that is known by its size and times
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
# By id: threads that are `reading`, and what each has opened.
_readers: dict[int, tuple[int, set[str]]] = {}


@contextlib.contextmanager
def reading() -> Iterator[set[str]]:
    """The files that this thread opens to read meanwhile: a config, and what it imports and reads.

    A config may import nothing and yet run other code, or read what it changes the code by.
    """
    _watch_opening()
    found = set()
    _readers[id(found)] = threading.get_ident(), found
    try:
        yield found
    finally:
        del _readers[id(found)]


@functools.cache  # nothing takes a hook away
def _watch_opening() -> None:
    def hook(event: str, args: tuple) -> None:
        if event != "open" or not _readers:
            return
        match args:
            case (str() | bytes() | os.PathLike() as file, _, int(flags)):
                if flags & _ACCESS == os.O_RDONLY:
                    for thread, found in list(_readers.values()):
                        if thread == threading.get_ident():
                            found.add(_source(os.path.abspath(os.fsdecode(file))))

    sys.addaudithook(hook)


def imported(read: set[str]) -> set[str]:
    """The files of all modules that are imported, and `read`."""
    found = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {os.path.abspath(file) for file in found if isinstance(file, str)} | read


def _source(file: str) -> str:
    """What a file of bytecode is made from."""
    if file.endswith(".pyc"):
        with contextlib.suppress(ValueError):  # it has no source
            return importlib.util.source_from_cache(file)
    return file


def stamps(files: Iterable[str], seen: dict[str, str]) -> dict[str, str]:
    """What changes when a file does, by file: as it was when this process first asked.

    Args:
        files: absolute paths.
        seen: what was found before; it grows.
    """
    for file in files:
        if file not in seen:
            seen.setdefault(file, _stamp(file))  # another thread may have been faster
    return {file: seen[file] for file in sorted(files)}


def _stamp(file: str) -> str:
    """Of installed packages and large files size and times, of all other files the bytes.

    "" for one that cannot be known, as in an archive: nothing is kept.
    """
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode):
            return ""
        installed = file.startswith(_installed()) and not file.startswith(_OWN)
        if installed or about.st_size > _LARGE:
            return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        if file.endswith(".py") and not _is_run(file, about):
            return ""
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:  # what a config looked for; modules that have no file, as of torch
        return "none"
    except (OSError, ValueError, SyntaxError):
        return ""


def _is_run(file: str, about: os.stat_result) -> bool:
    """Whether Python runs a source as it is: bytecode counts as its own if size and time agree."""
    try:
        if os.stat(importlib.util.cache_from_source(file)).st_ctime >= about.st_ctime:
            return True
    except OSError:  # no bytecode
        return True
    loader = SourceFileLoader("it", file)
    return loader.get_code("it") == loader.source_to_code(loader.get_data(file), file)


_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(os.path.abspath(paths[name]) + os.sep for name in names)


def newest_change(files: Iterable[str]) -> float:
    """When one of the files, or a link on the way to one, was last written, renamed or replaced:
    st_ctime, which nobody sets."""
    files, newest = set(files), 0.0
    for path in files | {os.fspath(parent) for file in files for parent in Path(file).parents}:
        with contextlib.suppress(FileNotFoundError):
            about = [os.lstat(path)] + [os.stat(path)] * (path in files)
            newest = max(newest, *(0 if stat.S_ISDIR(x.st_mode) else x.st_ctime for x in about))
    return newest


def process_start() -> float | None:
    """When this process began, in seconds as time.time(); None where /proc does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - age
    except (OSError, AttributeError, ValueError, IndexError):
        return None
