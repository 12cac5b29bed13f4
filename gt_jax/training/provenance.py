"""provenance.jsonl: what a run was started with each time, so that it can be repeated."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

import gt_jax

# The packages that decide what is computed.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


def record(workdir: str | Path, *, step: int, text: str) -> None:
    """Append a line to WORKDIR/provenance.jsonl.

    It has the time, the step it starts from, the command, the versions of Python and packages, the
    devices, JAX's and XLA's environment variables, the commit of gt_jax where that is a git
    checkout, and the hash of the text.

    Args:
        workdir: the run.
        step: steps done before.
        text: `gt_jax.training.text.fingerprint` of the tokens.
    """
    devices = jax.devices()
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
        "versions": {"gt_jax": gt_jax.__version__, "python": platform.python_version()} | _found(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": platform.platform(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))},
        "commit": commit(Path(gt_jax.__file__).parent),
        "text": text,
    }
    with (Path(workdir) / "provenance.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def commit(folder: Path) -> str | None:
    """The git commit of a folder that git tracks, ended by "+changes" if files differ from it.

    None where git does not track it, as an installed package, or is not there.
    """

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _found() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
