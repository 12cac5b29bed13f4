"""From a run's config to its token ids."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.config import Config
from gt_jax.data import (
    Corpus,
    CorpusTokens,
    encode_corpus,
    load_corpus,
    make_tokenizer,
    track_split,
)
from gt_jax.data.base import Tokenizer


class Text(NamedTuple):
    """A corpus and its token ids, split for training and validation."""

    corpus: Corpus
    tokenizer: Any
    tokens: CorpusTokens


def read_text(
    config: Config, *, tokenizer: Tokenizer | None = None, cache_dir: str | Path | None = None
) -> Text:
    """The text that config.data names.

    Args:
        config: uses the data group, and train.batch_size where data.split is "tracks".
        tokenizer: an existing one; made from the text if None.
        cache_dir: where a trained SentencePiece model is kept.

    Raises:
        InputError: there is no such text, or the tokenizer and the text do not fit.
    """
    data = config.data
    corpus = load_corpus(
        data.source, field=data.field, validation_fraction=data.validation_fraction
    )
    if tokenizer is None:
        tokenizer = make_tokenizer(
            data.tokenizer, corpus, vocab_size=data.vocab_size, cache_dir=cache_dir
        )
    tokens = encode_corpus(corpus, tokenizer)
    if data.split == "tracks":
        tokens = track_split(tokens, config.train.batch_size, data.validation_fraction)
    return Text(corpus, tokenizer, tokens)


def characters_per_token(tokenizer: Tokenizer, documents: Sequence[np.ndarray]) -> float:
    """How much text an id of these documents stands for; 1.0 for character tokenizers."""
    if tokenizer.kind.startswith("char"):
        return 1.0
    return sum(len(tokenizer.decode(ids)) for ids in documents) / sum(map(len, documents))


def fingerprint(tokens: CorpusTokens) -> str:
    """A hash of all token ids and of where documents end: another text has another one."""
    sums = hashlib.sha256()
    for documents in tokens:
        sums.update(np.array([len(documents), *map(len, documents)], "<i8").data)
        for ids in documents:
            sums.update(np.ascontiguousarray(ids, "<i4").data)
    return sums.hexdigest()
