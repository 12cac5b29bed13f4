"""Results that are parts of another one: what they share, and what they were measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.lab import results
from gt_jax.errors import InputError


def read(paths: Sequence[str] | None) -> dict[Path, dict]:
    """path -> result of the files of --parts, in their order.

    Raises:
        InputError: a file is no result, or is given twice.
    """
    paths = [Path(path) for path in paths or ()]
    for path in paths:
        if sum(path.resolve() == other.resolve() for other in paths) > 1:
            raise InputError(f"--parts: {path} is given twice")
    return {path: results.read(path) for path in paths}


def shared_settings(parts: Mapping[Path, dict], *, own: Sequence[str]) -> dict:
    """The settings of parts, with "quick"; none without parts.

    Args:
        parts: of `read`.
        own: settings in which they may differ, and which are left out.

    Raises:
        InputError: others differ.
    """
    shared = None
    for path, part in parts.items():
        settings = part["settings"] | {"quick": part.get("quick")}
        settings = {name: value for name, value in settings.items() if name not in own}
        shared = settings if shared is None else shared
        for name in shared | settings:
            if shared.get(name) != settings.get(name):
                raise InputError(
                    f"--parts: {path} has {name}={settings.get(name)} and {next(iter(parts))} "
                    f"{shared.get(name)}; give all parts the same flags"
                )
    return shared or {}


def commands(parts: Mapping[Path, dict]) -> dict[str, str]:
    """File -> command of parts, and of parts of theirs; files of one name are numbered."""
    found = {}
    for path, part in parts.items():
        alike = [other for other in parts if other.name == path.name]
        name = path.name if len(alike) == 1 else f"{path.name}, {alike.index(path) + 1}"
        found |= part["settings"].get("parts", {}) | {name: part["command"]}
    return found


def joint_origin(parts: Mapping[Path, dict], *here: Mapping) -> dict | None:
    """`results.origin` and seconds of a result that is of several; None of none.

    Args:
        parts: of `read`.
        here: the same of what was measured besides.
    """
    origins = [{n: part.get(n) for n in (*results.origin(), "seconds")} for part in parts.values()]
    origins += here
    several = {n: dict.fromkeys(o[n] for o in origins if o[n]) for n in results.origin()}
    joined = {name: ", ".join(each) or None for name, each in several.items()}
    return joined | {"seconds": round(sum(o["seconds"] for o in origins), 1)} if origins else None
