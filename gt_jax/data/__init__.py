"""Text in, batches of token ids out; NumPy only.

corpus = load_corpus("shakespeare")
tokenizer = make_tokenizer("char", corpus)
tokens = encode_corpus(corpus, tokenizer)  # .train and .validation: one array a document
batches = make_batches(tokens.train, order="windows", batch_size=64, seq_len=64, seed=0)
inputs, targets, segment_ids, resets = next(batches)  # endless; .state() and .restore() resume
held_out = evaluation_batches(tokens.validation, batch_size=64, seq_len=64)

Text of any size is prepared once, by `gt_jax.prepare`, and read from disk:

text = load_prepared("prepared/books:0.7,prepared/code:0.3")  # .tokens and .tokenizer, as above
"""

from gt_jax.data.batches import Batch, evaluation_batches, make_batches, track_split
from gt_jax.data.corpora import Corpus, load_corpus, load_held_out
from gt_jax.data.prepared import beginning, count_tokens, load_prepared, prepared_folders
from gt_jax.data.preparing import prepare
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
    "beginning",
    "count_tokens",
    "encode_corpus",
    "evaluation_batches",
    "load_corpus",
    "load_held_out",
    "load_prepared",
    "make_batches",
    "make_tokenizer",
    "prepare",
    "prepared_folders",
    "tokenizer_from_dict",
    "track_split",
]
