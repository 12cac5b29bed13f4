"""Tokenizers out of files, compared with the libraries that the files belong to."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from gt_jax.data import Corpus, encode_corpus, make_tokenizer, prepare
from gt_jax.data.learned import train_bpe
from gt_jax.data.tokenizers import read_tokenizer
from gt_jax.errors import InputError

TEXT = "The cat sat on the mat.\n\n  It was naïve; 漢字 😀 were 12345 of them.\n" * 30
CORPUS = Corpus("c", (TEXT, "a second document"), ("a third",))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT], 400)


def test_bpe_gives_every_text_back_and_is_the_same_every_time(bpe):
    assert train_bpe([TEXT], 400).to_dict() == bpe.to_dict()
    assert bpe.decode(bpe.encode(TEXT + "\0 ü \r\n")) == TEXT + "\0 ü \r\n"
    assert bpe.vocab_size <= 400 and bpe.eos_id == 0 == bpe.encode("<|endoftext|>")[0]
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    with pytest.raises(InputError, match="vocab_size=256 must be at least 257"):
        train_bpe([TEXT], 256)


def test_a_tokenizer_json_has_the_ids_of_its_library_and_a_known_end(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.text, "utf-8")
    theirs = Tokenizer.from_str(bpe.text)
    for name in (str(path), str(tmp_path)):
        ours = make_tokenizer(name, CORPUS)
        assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
        assert ours.eos_id == theirs.token_to_id("<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = read_tokenizer(str(path), "x")
    assert tokenizer.token_text(tokenizer.eos_id) == "<end>"


def test_documents_end_with_the_end_of_a_given_tokenizer(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.text, "utf-8")
    tokens = encode_corpus(CORPUS, make_tokenizer(str(tmp_path), CORPUS))
    for ids, text in zip(tokens.train, CORPUS.train):
        assert ids.tolist() == [*bpe.encode(text).tolist(), 0]


def test_a_sentencepiece_model_of_others_has_their_ids_in_blocks_too(tmp_path, monkeypatch):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # with a space before every text, as Llama's
        eos_id=1,
        bos_id=-1,
        unk_id=0,
        minloglevel=4,
    )
    path = tmp_path / "spm.model"
    path.write_bytes(model.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = read_tokenizer(str(path), "data.tokenizer")
    assert ours.special[:2] == (None, 1)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT)
    monkeypatch.setattr("gt_jax.data.sentence_piece._BLOCK_LENGTH", 100)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT)
    cut = TEXT.index("It")
    joined = np.concatenate([ours.encode(TEXT[:cut]), ours.encode_after(TEXT[cut:], TEXT[:cut])])
    assert ours.decode(joined) == theirs.decode(theirs.encode(TEXT))


def test_an_rwkv_vocabulary_is_read(tmp_path):
    lines = [f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)] + ["257 'cat' 3\n"]
    (tmp_path / "vocabulary.txt").write_text("".join(lines))
    tokenizer = read_tokenizer(str(tmp_path / "vocabulary.txt"), "data.tokenizer")
    assert tokenizer.encode("a cat").tolist() == [98, 33, 257] and tokenizer.eos_id == 0


def test_a_prepared_folder_gives_its_tokenizer(bpe, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=bpe, processes=1)
    assert read_tokenizer(str(tmp_path / "out"), "--tokenizer").to_dict() == bpe.to_dict()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("nowhere.json", None, "must be one of char, char97, sentencepiece, or a file"),
        ("tokenizer.json", "{}", "is no tokenizer.json, SentencePiece .model or RWKV"),
        ("spm.model", "no model", "is no tokenizer.json, SentencePiece .model or RWKV"),
        ("vocabulary.txt", "no vocabulary", "is no line of an RWKV vocabulary"),
        ("tokenizer.gt_jax.json", "[]", "is no tokenizer.json, SentencePiece .model or RWKV"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_an_error_of_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as found:
        make_tokenizer(str(path), CORPUS)
    assert "\n" not in str(found.value) and str(found.value).startswith("data.tokenizer=")
