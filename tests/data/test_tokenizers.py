import json
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.data import Corpus, encode_corpus, load_corpus, make_tokenizer, tokenizer_from_dict
from gt_jax.data.tokenizers import CharTokenizer, train_sentencepiece
from gt_jax.errors import InputError

PRINTABLE = Corpus("printable", (string.printable,), ("ǅ漢😀",))


@pytest.fixture(scope="module")
def shakespeare():
    return load_corpus("shakespeare")


@pytest.fixture(scope="module")
def sentencepiece(shakespeare):
    return make_tokenizer("sentencepiece", shakespeare, vocab_size=500)


def through_json(tokenizer):
    return tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))


def test_shakespeare_has_65_characters_and_char97_has_97_ids(shakespeare):
    assert make_tokenizer("char", shakespeare).vocab_size == 65
    assert make_tokenizer("char97", shakespeare).vocab_size == 97


@pytest.mark.parametrize("kind, first", [("char", 0), ("char97", 32)])
def test_ids_follow_code_points(kind, first):
    tokenizer = make_tokenizer(kind, Corpus("c", ("zebra",), ("😀 A",)))
    assert tokenizer.encode(" Aaberz😀").tolist() == list(range(first, first + 8))
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("a").dtype == np.int32


@pytest.mark.parametrize("kind", ["char", "char97"])
@given(text=st.text(alphabet=string.printable + "ǅ漢😀"))
def test_characters_come_back(kind, text):
    tokenizer = through_json(make_tokenizer(kind, PRINTABLE))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_char97_encodes_every_text(text):
    tokenizer = make_tokenizer("char97", Corpus("c", ("abc",), ("def",)))
    known = "".join(c if c in "abcdef" else "\0" for c in text)
    expected = [1 if c == "\0" else 32 + "abcdef".index(c) for c in known]
    assert tokenizer.encode(text).tolist() == expected


def test_char_names_the_characters_it_does_not_know():
    tokenizer = make_tokenizer("char", Corpus("c", ("abc",), ("d",)))
    with pytest.raises(InputError, match=r"text holds '!', 'é', not among the 4 characters"):
        tokenizer.encode("abé!é")


def test_char97_tags_are_one_token_each():
    tokenizer = make_tokenizer("char97", PRINTABLE)
    names = ["pad", "unk", "bos", "eos", "system", "user", "assistant", "end_of_turn"]
    names += ["input", "thinking", "output"]
    text = "".join(f"<|{name}|>{i}" for i, name in enumerate(names)) + "<|no|>"
    ids = tokenizer.encode(text)
    assert ids[:22:2].tolist() == list(range(11))
    assert len(ids) == 22 + len("<|no|>")
    assert tokenizer.decode(ids) == text


def test_char97_decodes_unknown_ids_to_question_marks():
    tokenizer = make_tokenizer("char97", Corpus("c", ("abc",), ("d",)))
    assert tokenizer.decode([32, 11, 31, 36, 10**6, -1, 33]) == "a?????b"


def test_sentencepiece_has_the_vocabulary_asked_for_and_shortens_text(shakespeare, sentencepiece):
    ids = sentencepiece.encode(shakespeare.validation[0])
    assert sentencepiece.vocab_size == 500
    assert ids.min() >= 0 and ids.max() < 500 and ids.dtype == np.int32
    assert len(ids) < 0.7 * len(shakespeare.validation[0])
    assert sentencepiece.decode(ids) == shakespeare.validation[0]


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="\u2581", codec="utf-8")))
def test_sentencepiece_brings_every_text_back(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_sentencepiece_goes_through_json(sentencepiece):
    text = "Now is the winter of our discontent\n"
    np.testing.assert_array_equal(
        through_json(sentencepiece).encode(text), sentencepiece.encode(text)
    )


def test_sentencepiece_training_repeats_itself(shakespeare, sentencepiece):
    again = make_tokenizer("sentencepiece", shakespeare, vocab_size=500)
    assert again.to_dict() == sentencepiece.to_dict()


def test_sentencepiece_encodes_long_texts_as_it_would_in_one_piece(sentencepiece, monkeypatch):
    text = "To be, or not to be:\n\nthat is the question.\n" * 50
    whole = sentencepiece.encode(text)
    monkeypatch.setattr("gt_jax.data.tokenizers._BLOCK_LENGTH", 100)
    np.testing.assert_array_equal(sentencepiece.encode(text), whole)
    assert sentencepiece.decode(sentencepiece.encode("x" * 1234)) == "x" * 1234


def test_sentencepiece_learns_from_lines_of_any_length():
    text = "the rain in spain falls mainly on the plain " * 1000
    tokenizer = make_tokenizer("sentencepiece", Corpus("c", (text,), ("x",)), vocab_size=290)
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_sentencepiece_is_kept_for_the_same_text_and_size_only(shakespeare, tmp_path, monkeypatch):
    trained = []
    train = tokenizers_module().train_sentencepiece
    monkeypatch.setattr(
        tokenizers_module(), "train_sentencepiece", lambda *a: trained.append(a) or train(*a)
    )

    def make(corpus, vocab_size):
        return make_tokenizer("sentencepiece", corpus, vocab_size=vocab_size, cache_dir=tmp_path)

    first = make(shakespeare, 400)
    assert make(shakespeare, 400).to_dict() == first.to_dict() and len(trained) == 1
    assert make(shakespeare, 410).vocab_size == 410 and len(trained) == 2
    make(shakespeare._replace(train=("Other text. " * 9, shakespeare.train[0])), 410)
    assert len(trained) == 3
    (tmp_path / "sentencepiece.json").write_text("{broken")
    assert make(shakespeare, 400).to_dict() == first.to_dict() and len(trained) == 4


def tokenizers_module():
    import gt_jax.data.tokenizers as module

    return module


@pytest.mark.parametrize(
    "vocab_size, message",
    [
        (50_000, "data.vocab_size=50000 is more than .* set at most [0-9]+$"),
        (100, "data.vocab_size=100 cannot hold .* set at least [0-9]+$"),
        (None, "data.vocab_size=None does not suit"),
    ],
)
def test_a_vocabulary_the_text_cannot_support_is_refused(shakespeare, vocab_size, message):
    short = shakespeare._replace(train=(shakespeare.train[0][:20_000],))
    with pytest.raises(InputError, match=message):
        make_tokenizer("sentencepiece", short, vocab_size=vocab_size)


def test_an_unknown_kind_is_refused_with_the_nearest_name(shakespeare):
    with pytest.raises(InputError, match=r"must be one of char, char97, .* 'sentencepiece'"):
        make_tokenizer("sentence-piece", shakespeare)


@pytest.mark.parametrize("kind, ends", [("char", False), ("char97", True), ("sentencepiece", True)])
def test_documents_of_many_end_with_eos(shakespeare, kind, ends):
    text = shakespeare.train[0][:20_000]
    for train, many in (((text,), False), ((text, text[:100]), True)):
        corpus = Corpus("c", train, (text[:50],))
        tokenizer = make_tokenizer(kind, corpus, vocab_size=400)
        tokens = encode_corpus(corpus, tokenizer)
        for split, ids in zip(corpus[1:3], tokens, strict=True):
            for document, i in zip(split, ids, strict=True):
                expected = tokenizer.encode(document).tolist() + [3] * (ends and many)
                assert i.tolist() == expected and i.dtype == np.int32


def test_half_a_surrogate_pair_is_an_error_of_one_line():
    """Except for characters, of which it may be one."""
    text = "one line and another\n" * 40
    tokenizer = train_sentencepiece([text], 290)
    for use in (tokenizer.encode, lambda bad: train_sentencepiece([text, bad], 290)):
        with pytest.raises(InputError, match="half a surrogate pair") as found:
            use("here: \ud83d")
        assert "\n" not in str(found.value)
    assert CharTokenizer("a\ud83d").decode([0, 1]) == "a\ud83d"


def test_sentencepiece_decodes_unknown_ids():
    tokenizer = train_sentencepiece(["one line and another\n" * 40], 290)
    ids = tokenizer.encode("one").tolist()
    assert tokenizer.decode([*ids, 5000, -1, *ids]) == "one\ufffd\ufffdone"
