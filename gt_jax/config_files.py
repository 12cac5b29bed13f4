"""Config files: Python files whose get_config() returns settings, found by path or by name.

A config file runs when it is loaded: load only files that you trust.
"""

import importlib.util
from pathlib import Path

from ml_collections import config_dict

import gt_jax
from gt_jax.config import walk_fields
from gt_jax.errors import InputError, did_you_mean, one_line


def folder() -> Path:
    """Where the configs that come with gt_jax lie: installed with the package, or in its clone."""
    package = Path(gt_jax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file that --config=name means.

    Args:
        name: a path, or the name of a config that comes with gt_jax, as `gf_mh`, `gf_mh.py` or
            `configs/gf_mh.py` from any folder.

    Raises:
        InputError: the file does not exist; the message suggests the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")):
        own = folder() / f"{path.stem}.py"
        if own.is_file():
            return own
    known = sorted(p.stem for p in folder().glob("*.py"))
    hint = did_you_mean(path.stem, known) or f"; by name there are {', '.join(known)}"
    raise InputError(f"--config={name} is not a file{hint}")


def load_config(name: str) -> config_dict.ConfigDict:
    """What get_config() of a config file returns.

    Raises:
        InputError: the file does not exist, does not run, or returns something else.
    """
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"gt_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={name} must be a Python file, named *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit, GeneratorExit) as error:
        raise InputError(f"--config={name}: {_where(error, path)}") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise InputError(
            f"--config={name}: get_config() returned {type(config).__name__}; it must return the "
            "ConfigDict of gt_jax.config.default_config() with what differs"
        )
    lacking = [field for field, _ in walk_fields() if not _has(config, field)]
    if lacking:
        raise InputError(
            f"--config={name}: get_config() returned no {lacking[0]}; it must return the "
            "ConfigDict of gt_jax.config.default_config() with what differs"
        )
    return config


def _has(config, field: str) -> bool:
    for part in field.split("."):
        if not isinstance(config, config_dict.ConfigDict) or part not in config:
            return False
        config = config.get(part)
    return True


def _where(error: BaseException, path: Path) -> str:
    """The error in one line, with the line of the file at which it happened."""
    if isinstance(error, SyntaxError):
        return f"{f'line {error.lineno}: ' if error.lineno else ''}{error.msg}"
    line, step = None, error.__traceback__
    while step is not None:
        if Path(step.tb_frame.f_code.co_filename) == path:
            line = step.tb_lineno
        step = step.tb_next
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "it defines no get_config(); see configs/gf_mh.py for an example"
    # ml_collections says much more than the first line of its errors.
    reason = one_line(str(error).strip().split("\n")[0])
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {reason}"
