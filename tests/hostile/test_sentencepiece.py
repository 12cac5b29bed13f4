"""Mutated SentencePiece models: taken and usable to the last id, or refused in one line."""

import base64

import numpy as np

from gt_jax.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from gt_jax.errors import InputError
from gt_jax.generation.text import TextOut
from tests.hostile.mutations import bounded, mutate

FILES = 1200
TEXT = "the cat sat on the mat, 猫 'zq'. "


def test_mutated_models():
    model = base64.b64decode(train_sentencepiece([TEXT * 30], 300).to_dict()["model"])
    rng, refused = np.random.default_rng(0), 0
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            try:
                tokenizer = SentencePieceTokenizer(mutate(rng, model, most=2))
            except InputError as error:
                assert str(error).startswith("the SentencePiece model is damaged (")
                assert str(error).isprintable()
                refused += 1
                continue
            ids = [*tokenizer.encode(TEXT).tolist(), *range(tokenizer.vocab_size), 10**6]
            out = TextOut(tokenizer, [])
            assert out.add(ids)[0] + out.end() == tokenizer.decode(ids)
    assert 0 < refused < FILES
