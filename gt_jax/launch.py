"""What this process runs, told by how it was launched."""

import base64
import hashlib
import os
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def runs(command: str) -> bool:
    """Whether this process runs a command, and nothing else that could have changed its code.

    It does as `python -m gt_jax.train`, `python -m gt_jax train` or the installed `gt-jax train`.

    Args:
        command: for example "gt_jax.train", where it is called from.
    """
    main, package = sys.modules.get("__main__"), command.partition(".")[0]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return spec.name in (command, f"{package}.__main__")
    return _is_as_installed(getattr(main, "__file__", None), package)


def _is_as_installed(script: str | None, package: str) -> bool:
    """Whether a script is one that an installer wrote for a package, by the hash in its record."""
    if script is None:
        return False
    try:
        recorded = [file for file in files(package) or () if file.name == Path(script).name]
        hashes = [x.hash for x in recorded if x.hash and os.path.samefile(x.locate(), script)]
        written = Path(script).read_bytes()
    except (OSError, PackageNotFoundError):
        return False
    found = base64.urlsafe_b64encode(hashlib.sha256(written).digest()).rstrip(b"=").decode()
    return [(x.mode, x.value) for x in hashes] == [("sha256", found)]
