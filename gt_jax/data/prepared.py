"""Prepared folders as the text of a run: one, or several mixed by weight."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.data.files import short
from gt_jax.data.mapped import MappedTokens
from gt_jax.data.shards import is_prepared, open_prepared
from gt_jax.data.tokenizers import CorpusTokens
from gt_jax.errors import InputError


class PreparedText(NamedTuple):
    """Tokens on disk, the tokenizer that made them, and a line worth showing or None."""

    tokens: CorpusTokens
    tokenizer: Tokenizer
    note: str | None


def prepared_folders(source: str, named: str = "data.source") -> dict[str, float] | None:
    """The prepared folders that a source names, each with its weight; None for other text.

    Args:
        source: a folder, or DIR:WEIGHT,DIR:WEIGHT,...
        named: what named it, to begin a message with.

    Raises:
        InputError: a weight is missing or no number above 0, a folder of several is not prepared.
    """
    if is_prepared(source):
        return {source: 1.0}
    if "," not in source or source.startswith("tfds:") or _exists(source):
        return None
    where, weights = f"{named}={short(source)}", {}
    for entry in source.split(","):
        folder, _, weight = entry.strip().rpartition(":")
        if not folder:
            raise InputError(f"{where}: {entry.strip()!r} has no weight; write DIR:WEIGHT")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InputError(f"{where}: weight {weight!r} of {folder} must be a number above 0")
        if not is_prepared(folder):
            raise InputError(
                f"{where}: {folder} is no prepared folder; run `python -m gt_jax.prepare SRC DST`"
            )
        if places([folder]) & places(weights):
            raise InputError(f"{where} names {folder} twice; add its weights up")
        weights[folder] = value
    if math.isinf(sum(weights.values())):
        raise InputError(f"{where}: the weights add up to infinity; divide all by one number")
    return weights


def load_prepared(
    source: str | Mapping[str, float], *, validation_fraction: float = 0.1
) -> PreparedText:
    """Opens prepared folders; their tokens stay on disk.

    Args:
        source: as `prepared_folders` takes it, or what it returned.
        validation_fraction: of the documents of a folder whose files named no validation split, or
            of the tokens of a lone document: the last ones validate. With 0 all of them train, and
            there are no validation tokens unless every folder has a validation split.

    Raises:
        InputError: a folder is unfinished, damaged or too small, or folders have other tokenizers.
    """
    folders = prepared_folders(source) if isinstance(source, str) else source
    if folders is None:
        raise InputError(f"data.source={source!r} is no prepared folder")
    opened = [open_prepared(name) for name in folders]
    train, held_out = [], []
    for folder in opened:
        check_tokenizers(folder.folder, folder.tokenizer, opened[0].folder, opened[0].tokenizer)
        tokens = MappedTokens.of_shards(folder.shards["train"])
        validation = MappedTokens.of_shards(folder.shards["validation"])
        if not validation.size and validation_fraction:
            if tokens.size < 4:
                raise InputError(
                    f"{folder.folder} has {tokens.size} tokens, too few to split; add text"
                )
            tokens, validation = tokens.split(validation_fraction)
        train.append(tokens)
        held_out.append(validation)
    weights, total = list(folders.values()), sum(folders.values())
    note = next((folder.index["note"] for folder in opened), None)
    if len(folders) > 1:
        note = ", ".join(f"{100 * w / total:.3g} % {name}" for name, w in folders.items())
    if not all(validation.size for validation in held_out):
        held_out, weights = held_out[:0], []
    tokens = CorpusTokens(
        MappedTokens.mixture(train, list(folders.values())), MappedTokens.mixture(held_out, weights)
    )
    return PreparedText(tokens, opened[0].tokenizer, note)


def places(folders: Iterable[str]) -> set[Path]:
    """Where folders lie, by whatever names."""
    return {Path(folder).expanduser().resolve() for folder in folders}


def check_tokenizers(name: object, mine: Tokenizer, other: object, theirs: Tokenizer) -> None:
    """Raise InputError unless two sources of tokens have the same tokenizer."""
    if mine.to_dict() != theirs.to_dict():
        raise InputError(
            f"{name} and {other} have other tokenizers ({mine.kind} of {mine.vocab_size} ids and "
            f"{theirs.kind} of {theirs.vocab_size}); prepare both with one --tokenizer"
        )


def count_tokens(documents: Sequence[np.ndarray]) -> int:
    """Tokens of all documents together."""
    return documents.size if isinstance(documents, MappedTokens) else sum(map(len, documents))


def beginning(documents: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The first `size` ids of the first document, or as many as it has."""
    if isinstance(documents, MappedTokens):
        return next(iter(documents.between(0, min(size, documents.size))))
    return documents[0][:size]


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
