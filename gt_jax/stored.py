"""The description of a stored model, compared with its files before a model is built from it."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gt_jax.config import Config, computation_dtype, from_stored
from gt_jax.data import tokenizer_from_dict
from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError, one_line
from gt_jax.models import ModelConfig

LARGEST_SIZE = 1 << 31  # of any number in a model's configuration
MOST_PACKED = 64  # parameters may have so many times their bytes on disk; real ones hardly shrink
ALWAYS_FINE = 1 << 26  # bytes of parameters that are accepted without a look at the disk


def describe(
    folder: Path, about: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[ModelConfig, Tokenizer]:
    """The model and tokenizer of a checkpoint folder.

    Building a model of 1000 blocks takes a minute, so a small file must not be able to claim one.

    Args:
        folder: the checkpoint.
        about: its JSON part.
        shapes: of the parameters in its files, by path such as "blocks_0/rwkv/key/kernel".

    Returns:
        (ModelConfig for this machine, tokenizer).

    Raises:
        InputError: `about` is damaged, or says other sizes than the files have.
    """
    try:
        fields: dict[str, Any] = dict(about["model"])
        if any(type(value) is int and value > LARGEST_SIZE for value in fields.values()):
            raise ValueError("a size of its model is out of all proportion")
        # Of this machine: the dtype if it was "auto", and always the implementation of recurrences.
        dtype = computation_dtype(about["config"]["model"]["dtype"])
        fields |= {"dtype": dtype, "impl": "auto"}
        config = ModelConfig(**fields)
        _check_sizes(folder, config, shapes)
        tokenizer = tokenizer_from_dict(about["tokenizer"])
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"its tokenizer has {tokenizer.vocab_size} ids and its model {config.vocab_size}"
            )
    except Exception as error:  # packages that read tokenizers raise many kinds
        raise _damaged(folder, error) from error
    return config, tokenizer


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Inside, what `about` of a folder says is used: of another form, it is one line.

    Raises:
        InputError: as raised inside; in place of other exceptions, one that names the folder.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder, error):
    said = error.args[0] if isinstance(error, KeyError) else error
    missing = f"{said} is missing" if isinstance(error, KeyError) else said
    return InputError(f"{folder} is damaged: {one_line(missing)}")


def run_config(folder: Path, about: Mapping[str, Any]) -> Config | None:
    """The settings of the run that a checkpoint is of; None of a converted model.

    Raises:
        InputError: they have another form, or are none that a run can have.
    """
    with readable(folder):
        settings = about["config"]
        if not isinstance(settings, dict):
            raise TypeError("its config is no object")
    return from_stored(settings) if "data" in settings else None


def _check_sizes(folder, config, shapes):
    """Raise ValueError unless the sizes that decide how long building takes are the files'."""
    blocks = {match[0] for match in map(re.compile(r"blocks_\d+/").match, shapes) if match}
    if len(blocks) != config.layers:
        raise ValueError(f"model.layers={config.layers}, and its files hold {len(blocks)} blocks")
    embedding = shapes.get("embedding/embedding")
    if embedding is not None and embedding != (config.vocab_size, config.dim):
        raise ValueError(
            f"model.vocab_size={config.vocab_size} and model.dim={config.dim}, and its files hold "
            f"an embedding {list(embedding)}"
        )
    on_disk = sum(p.stat().st_size for p in (folder / "params").rglob("*") if p.is_file())
    claimed = 4 * sum(map(math.prod, shapes.values()))
    if claimed > MOST_PACKED * on_disk + ALWAYS_FINE:
        raise ValueError(f"it claims {claimed:,} bytes of parameters in files of {on_disk:,}")
