"""One run at a time in a folder: WORKDIR/lock names the process that holds it.

The lock is the operating system's (flock), so it ends with the process however that ends. Where a
file system has none, the file's text decides: a process of this machine that no longer runs, or ran
before the machine's last start, holds nothing.
"""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from gt_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
    """Hold the lock of a run's folder: made if need be, removed again if nothing was put there.

    Raises:
        InputError: another process holds it; the message names host, process and since when.
    """
    folder = Path(workdir)
    path = folder / "lock"
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    file = _acquire(path)
    try:
        file.seek(0)
        file.truncate()
        json.dump(_this_process(), file)
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # Still locked: nobody else can have taken it over.
        file.close()
        for parent in made:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


def _acquire(path: Path):
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            if path.parent.exists():
                raise
            continue  # a run that left nothing has just removed the folder
        try:
            if fcntl is None:
                raise OSError("no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path, _holder(file)) from None
        except OSError:  # This file system cannot lock.
            holder = _holder(file)
            if holder and _runs(holder):
                raise _held(path, holder) from None
            return file
        # The holder before may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _this_process() -> dict:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "boot": _boot()}


def _boot() -> str | None:
    """A name of the machine's last start; None where the system gives none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _holder(file) -> dict:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (OSError, ValueError, TypeError):
        return {}


def _runs(holder: dict) -> bool:
    """Whether the process that a lock names may still run."""
    if holder.get("host") != socket.gethostname():
        return True
    if holder.get("boot") != _boot():
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, KeyError, TypeError):
        return False
    except OSError:
        pass
    return True


def _held(path: Path, holder: dict) -> InputError:
    names = (f"{name} {holder[name]}" for name in ("host", "pid", "since") if name in holder)
    who = f" ({', '.join(names)})" if holder else ""
    return InputError(
        f"another run{who} uses {path.parent}: wait for it or stop it, give another --workdir, or "
        f"delete {path} if that run is surely over"
    )
