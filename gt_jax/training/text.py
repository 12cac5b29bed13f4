"""From a run's config to its token ids."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.config import Config, Data
from gt_jax.data import (
    Corpus,
    CorpusTokens,
    encode_corpus,
    load_corpus,
    load_prepared,
    make_tokenizer,
    prepared_folders,
    track_split,
)
from gt_jax.data.base import Tokenizer
from gt_jax.data.corpora import load_held_out
from gt_jax.data.mapped import MappedTokens
from gt_jax.data.prepared import check_tokenizers, places
from gt_jax.data.tokenizers import KINDS, read_tokenizer
from gt_jax.errors import InputError


class Text(NamedTuple):
    """A corpus and its token ids, split for training and validation.

    Of prepared text the corpus has a name and a note alone, and the tokens stay on disk.
    """

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
    folders = prepared_folders(data.source)
    others = prepared_folders(data.validation_source, "data.validation_source")
    if folders is not None:
        return _read_prepared(config, folders, others, tokenizer)
    if others is not None:
        raise InputError(
            f"data.validation_source={data.validation_source} is prepared and "
            f"data.source={data.source} is not; prepare both with one --tokenizer"
        )
    corpus = load_corpus(
        data.source,
        field=data.field,
        validation_fraction=data.validation_fraction,
        validation_source=data.validation_source,
    )
    if tokenizer is None:
        tokenizer = make_tokenizer(
            data.tokenizer, corpus, vocab_size=data.vocab_size, cache_dir=cache_dir
        )
    tokens = encode_corpus(corpus, tokenizer)
    if data.split == "tracks":
        tokens = track_split(tokens, config.train.batch_size, data.validation_fraction)
    return Text(corpus, tokenizer, tokens)


def _read_prepared(config: Config, folders, others, tokenizer: Tokenizer | None) -> Text:
    """The text of prepared folders, which stays on disk.

    Args:
        folders, others: of data.source and data.validation_source, see `prepared_folders`.
        tokenizer: of the model to continue from, if there is one.
    """
    data = config.data
    if data.split != "contiguous":
        raise InputError(f"data.split={data.split} cuts text in memory, and {data.source} is not")
    fraction = 0.0 if data.validation_source else data.validation_fraction
    text = load_prepared(folders, validation_fraction=fraction)
    if tokenizer is not None:
        check_tokenizers("model.init_from", tokenizer, data.source, text.tokenizer)
    elif data.tokenizer not in (Data.tokenizer, text.tokenizer.kind):
        if data.tokenizer in KINDS:
            raise InputError(
                f"data.tokenizer={data.tokenizer} is not the {text.tokenizer.kind} tokenizer of "
                f"data.source={data.source}; leave data.tokenizer out, or prepare the text again"
            )
        wanted = read_tokenizer(data.tokenizer, "data.tokenizer")
        check_tokenizers(f"data.tokenizer={data.tokenizer}", wanted, data.source, text.tokenizer)
    validation, note, trains = text.tokens.validation, text.note, False
    if others is not None:
        held_out = load_prepared(others, validation_fraction=0.0)
        check_tokenizers(data.validation_source, held_out.tokenizer, data.source, text.tokenizer)
        validation = held_out.tokens.validation or held_out.tokens.train
        trains = not held_out.tokens.validation and places(folders) & places(others)
    elif data.validation_source:
        documents = load_held_out(data.validation_source, data.field)
        validation = encode_corpus(Corpus("", (), documents), text.tokenizer).validation
    if data.validation_source:
        said = f"validates on {data.validation_source}" + (", which trains too" if trains else "")
        note = "; ".join(filter(None, [note, said]))
    corpus = Corpus(data.source, (), (), note)
    return Text(corpus, text.tokenizer, CorpusTokens(text.tokens.train, validation))


def characters_per_token(tokenizer: Tokenizer, documents: Sequence[np.ndarray]) -> float:
    """How much text an id of these documents stands for; 1.0 for character tokenizers.

    Of tokens on disk the first million are measured.
    """
    if tokenizer.kind.startswith("char"):
        return 1.0
    if isinstance(documents, MappedTokens):
        documents = documents.head(1 << 20)
    return sum(len(tokenizer.decode(ids)) for ids in documents) / sum(map(len, documents))


def fingerprint(tokens: CorpusTokens) -> str:
    """A hash of all token ids and of where documents end: another text has another one."""
    sums = hashlib.sha256()
    for documents in tokens:
        if isinstance(documents, MappedTokens):
            sums.update(documents.digest())
            continue
        sums.update(np.array([len(documents), *map(len, documents)], "<i8").data)
        for ids in documents:
            sums.update(np.ascontiguousarray(ids, "<i4").data)
    return sums.hexdigest()
