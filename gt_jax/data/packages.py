"""A corpus of program text out of pinned packages of the Python package index.

packages.txt names wheels by version and SHA-256, so that everyone gets the same text, wherever the
index or a mirror of it can be reached.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from gt_jax.errors import InputError, one_line

PACKAGES = Path(__file__).with_name("packages.txt")
HELD_OUT = {"networkx": "valid", "nltk": "valid", "celery": "test", "xarray": "test"}
_SHORTEST, _LONGEST = 100, 1_000_000  # bytes of a file; longer ones are tables more than programs
_LICENCES = ("licen", "copying", "notice", "copyright", "authors")


def build_corpus(
    target: str | Path, packages: str | Path = PACKAGES, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Download packages and write their Python sources as documents, split by package.

    Args:
        target: folder to make: train, valid and test with one .jsonl a package, whose lines hold
            text, package and path; sources.json, which is returned; LICENSES, with all their texts.
        packages: a requirements file of NAME==VERSION --hash=sha256:..., one a line.
        say: called with lines on the progress.

    Returns:
        {"packages": [{"name", "version", "licence", "split", "files", "bytes", "repeated"}, ...],
        "bytes": of all texts, "sha256": of all texts}.

    Raises:
        InputError: target is there already, pip cannot download, or a wheel is not as pinned.
    """
    target = Path(target).expanduser()
    if target.exists():
        raise InputError(f"{target} is there already; name a folder to make")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as folder:
        wheels, made = Path(folder) / "wheels", Path(folder) / "corpus"
        say(f"downloads the packages of {packages}")
        _download(packages, wheels)
        made.mkdir()
        about = _write(wheels, made, say)
        made.replace(target)
    return about


def _download(packages, wheels: Path) -> None:
    """Call pip, which checks the hashes; nothing is installed and no code of a package runs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--require-hashes"]
    command += ["--dest", str(wheels), "--requirement", str(packages)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(errors[0] if errors else done.stderr or "no message")
        raise InputError(f"pip cannot download the packages of {packages} ({reason})")


def _write(wheels: Path, made: Path, say) -> dict[str, Any]:
    """Write the corpus of downloaded wheels. Held-out packages choose first among equal files."""
    found = sorted((_name_of(path), path) for path in wheels.glob("*.whl"))
    found.sort(key=lambda item: item[0] not in HELD_OUT)
    if not found:
        raise InputError("there are no packages to collect")
    seen, rows, total = set(), [], hashlib.sha256()
    with (made / "LICENSES").open("w", encoding="utf-8") as licences:
        for name, path in found:
            with _opened(path) as wheel:
                row = _write_package(name, wheel, made, seen, total)
                licences.write(_licences(row, wheel))
            rows.append(row)
            say(f"{name} {row['version']}: {row['files']:,} files, {row['bytes'] / 1e6:.1f} MB")
    about = {
        "packages": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "sha256": total.hexdigest(),
    }
    (made / "sources.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return about


def _write_package(name, wheel: zipfile.ZipFile, made: Path, seen: set, total) -> dict[str, Any]:
    """Write the files of a package that no package before had. Returns its row of sources.json."""
    split = HELD_OUT.get(name, "train")
    (made / split).mkdir(exist_ok=True)
    metadata = _metadata(wheel)
    size = files = repeated = 0
    with (made / split / f"{name}.jsonl").open("w", encoding="utf-8") as out:
        for inside in sorted(wheel.namelist()):
            if not inside.endswith(".py"):
                continue
            data = wheel.read(inside).replace(b"\r\n", b"\n")
            if not _SHORTEST <= len(data) <= _LONGEST:
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                repeated += 1
                continue
            with contextlib.suppress(UnicodeDecodeError):
                row = {"text": data.decode("utf-8"), "package": name, "path": inside}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                seen.add(digest)
                total.update(digest)
                size += len(data)
                files += 1
    return {
        "name": name,
        "version": metadata["Version"],
        "licence": _licence(metadata),
        "split": split,
        "files": files,
        "bytes": size,
        "repeated": repeated,
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (zipfile.BadZipFile, StopIteration) as error:
        raise InputError(f"{path.name} is no wheel ({one_line(error)})") from error


def _name_of(path: Path) -> str:
    return path.name.split("-")[0].replace("_", "-").lower()


def _metadata(wheel: zipfile.ZipFile):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(wheel.read(name).decode("utf-8", "replace"))


def _licence(metadata) -> str:
    """What a package says its licence is, in one line."""
    stated = metadata["License-Expression"]
    classified = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License :: ") and line.count("::") > 1
    ]
    return one_line(stated or "; ".join(classified) or metadata["License"] or "not stated", 80)


def _licences(row: dict[str, Any], wheel: zipfile.ZipFile) -> str:
    """The texts of a package's licence files under a heading."""
    parts = [f"{'=' * 100}\n{row['name']} {row['version']}: {row['licence']}\n{'=' * 100}\n"]
    for name in sorted(wheel.namelist()):
        folder, _, file = name.rpartition("/")
        if ".dist-info" in folder and file.lower().startswith(_LICENCES):
            parts.append(f"--- {name}\n{wheel.read(name).decode('utf-8', 'replace')}\n")
    return "\n".join(parts)
