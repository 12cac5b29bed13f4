import numpy as np
import pytest

from gt_jax.data.pretrained import IdTokenizer
from gt_jax.data.tokenizers import CharTokenizer, TaggedCharTokenizer, train_sentencepiece
from gt_jax.generation.text import TextOut


class Bytes:
    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


SENTENCE = "Höre, 水 and 🌍: to be or not to be. " * 6


def chunks_of(ids, seed):
    """ids cut at random places."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(ids) + 1, 12))
    return [part.tolist() for part in np.split(np.asarray(ids, np.int64), cuts)]


@pytest.mark.parametrize("seed", range(5))
def test_deltas_join_to_the_whole_text(seed):
    sentencepiece = train_sentencepiece([SENTENCE * 20], 300)
    for tokenizer, ids in (
        (Bytes(), list(SENTENCE.encode())),
        (sentencepiece, sentencepiece.encode(SENTENCE).tolist()),
        (IdTokenizer(50), list(range(50)) * 3),
    ):
        before, after = ids[:7], ids[7:]
        out = TextOut(tokenizer, before)
        shown = "".join(out.add(part)[0] for part in chunks_of(after, seed)) + out.end()
        assert tokenizer.decode(before) + shown == tokenizer.decode(ids)


def test_half_a_character_is_held_back_until_it_is_whole_or_the_end():
    out = TextOut(Bytes(), b"a")
    assert [out.add([byte])[0] for byte in "hé!".encode()] == ["h", "", "é", "!"]
    assert out.add("é".encode()[:1])[0] == "" and out.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("seed", range(5))
def test_stop_string_ends_text_and_ids_wherever_it_is_cut(seed):
    text = "one END two ENDING three"
    out = TextOut(Bytes(), b"", stop=("ENDING", "not there"))
    shown, used = "", 0
    for part in chunks_of(list(text.encode()), seed):
        new, taken = out.add(part)
        shown, used = shown + new, used + taken
        if out.stopped:
            break
    assert shown + out.end() == "one END two " and used == len("one END two ENDING")


def test_start_of_a_stop_string_appears_once_it_is_none():
    out = TextOut(Bytes(), b"", stop=("abcd",))
    shown = [out.add([byte])[0] for byte in b"xababce"]
    assert shown == ["x", "", "", "ab", "", "", "abce"]
    assert out.add(list(b"ab"))[0] == "" and out.end() == "ab"


def test_earliest_of_several_stop_strings_counts():
    out = TextOut(Bytes(), b"", stop=("cde", "bcd"))
    assert out.add(list(b"abcdef")) == ("a", 4)


@pytest.mark.parametrize("kind", [CharTokenizer, TaggedCharTokenizer])
@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_characters_are_decoded_once_and_without_what_is_before(kind, stop, monkeypatch):
    tokenizer, decoded = kind("abz "), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(list(ids)) or decode(ids))
    out = TextOut(tokenizer, tokenizer.encode("ab" * 32), stop)
    bursts = [tokenizer.encode(text).tolist() for text in ("a bb", "az", " ")]
    assert [out.add(burst)[0] for burst in bursts] == (
        ["a bb", "a", "z "] if stop else ["a bb", "az", " "]
    )
    assert decoded == bursts and out.end() == ""
