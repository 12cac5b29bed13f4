"""Text in, batches of token ids out; NumPy only.

corpus = load_corpus("shakespeare")
tokenizer = make_tokenizer("char", corpus)
tokens = encode_corpus(corpus, tokenizer)  # .train and .validation: one array a document
batches = make_batches(tokens.train, order="windows", batch_size=64, seq_len=64, seed=0)
inputs, targets, segment_ids, fresh = next(batches)  # endless; .state() and .restore() resume
held_out = evaluation_batches(tokens.validation, batch_size=64, seq_len=64)
"""

from gt_jax.data.batches import Batch, evaluation_batches, make_batches, track_split
from gt_jax.data.corpora import Corpus, load_corpus, load_held_out
from gt_jax.data.tokenizers import (
    CorpusTokens,
    encode_corpus,
    make_tokenizer,
    tokenizer_from_dict,
)

__all__ = [
    "Batch",
    "Corpus",
    "CorpusTokens",
    "encode_corpus",
    "evaluation_batches",
    "load_corpus",
    "load_held_out",
    "make_batches",
    "make_tokenizer",
    "tokenizer_from_dict",
    "track_split",
]
