"""Streamed text against all ids decoded at once, for every kind of tokenizer."""

import functools
import time

import numpy as np
import pytest

from gt_jax.data.pretrained import HuggingFaceTokenizer, IdTokenizer, WorldTokenizer
from gt_jax.data.tokenizers import CharTokenizer, TaggedCharTokenizer, train_sentencepiece
from gt_jax.generation.text import TextOut

SCRIPTS = (
    "the cat sat on the mat. don't you, it's fine! ",
    "你好世界，今天天气很好。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ",
    "e\u0301te\u0301 Z\u0351\u036b\u0343 ",
    "مرحبا بالعالم ",
    "สวัสดีชาวโลก ",
    "a\n\t\x00\ufffd\u2028 .  ' s n't",
)
WORLD = [bytes([i]) for i in range(256)] + [b"the", b" cat", "好".encode()[1:] + b" \xe4"]
HUGGING_FACE = ("byte-level", "byte-fallback", "wordpiece", "word-level", "unigram", "end-of-word")
KINDS = (*HUGGING_FACE, "cleaned", "char", "char97", "sentencepiece", "rwkv-world", "ids")


@functools.cache
def tokenizer_of(kind):
    everything = "".join((*SCRIPTS, "ok"))
    if kind in ("char", "char97"):
        return (CharTokenizer if kind == "char" else TaggedCharTokenizer)(everything)
    if kind == "sentencepiece":
        return train_sentencepiece([SCRIPTS[0] * 30], 290)
    if kind == "rwkv-world":
        lines = (f"{n + 1} {token!r} {len(token)}" for n, token in enumerate(WORLD))
        return WorldTokenizer(WorldTokenizer.pack("\n".join(lines)))
    if kind == "ids":
        return IdTokenizer(50)
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    from tests.data import small_tokenizers

    if kind == "cleaned":
        return HuggingFaceTokenizer(small_tokenizers.wordpiece().to_str(), cleans_up=True)
    return HuggingFaceTokenizer(small_tokenizers.KINDS[kind]().to_str())


def streamed(tokenizer, before, ids, chunk, stop=()):
    """(text, ids used, whether a stop string ended it)."""
    out, shown, used = TextOut(tokenizer, before, stop), "", 0
    for start in range(0, len(ids), chunk):
        text, count = out.add(ids[start : start + chunk])
        shown, used = shown + text, used + count
        if out.stopped:
            return shown, used, True
    return shown + out.end(), used, False


def whole(tokenizer, before, ids):
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


@pytest.mark.parametrize("chunk", [1, 2, 5, 32, 10_000])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ids"])
def test_texts_of_every_script_are_those_decoded_at_once(kind, chunk):
    tokenizer = tokenizer_of(kind)
    before = tokenizer.encode("the cat").tolist()
    for text in (*SCRIPTS, "".join(SCRIPTS), SCRIPTS[1] * 20 + "ok", SCRIPTS[2] * 20 + "ok"):
        ids = tokenizer.encode("a" + text).tolist()
        for start in ([], before):
            found = streamed(tokenizer, start, ids, chunk)[0]
            assert found == whole(tokenizer, start, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_in_any_bursts_are_those_decoded_at_once(kind):
    """Broken bytes, unknown ids and special tokens too."""
    tokenizer = tokenizer_of(kind)
    rng = np.random.default_rng(0)
    for n in range(150):
        few = rng.integers(0, tokenizer.vocab_size + (n % 3), 6 if n % 2 else 400)
        ids = rng.choice(few, 40).tolist()
        start = int(rng.integers(0, 5)) if kind != "cleaned" else 0
        before, after = ids[:start], ids[start:]
        if "\ufffd" in tokenizer.decode(before)[-3:]:
            continue  # said below
        for chunk in (1, int(rng.integers(2, 9)), 64):
            assert streamed(tokenizer, before, after, chunk)[0] == whole(tokenizer, before, after)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "sentencepiece", "rwkv-world"])
def test_prompt_may_end_inside_a_character(kind):
    tokenizer = tokenizer_of(kind)
    text = "x ok 世界🙂世界 and so on"
    ids = tokenizer.encode(text).tolist()
    for cut in range(1, len(ids)):
        before, after = ids[:cut], ids[cut:]
        shown = tokenizer.decode(before)
        shown = max((text[:n] for n in range(len(text)) if shown.startswith(text[:n])), key=len)
        if kind == "byte-fallback" and "\ufffd" in tokenizer.decode(before):
            shown = max(
                (text[:n] for n in range(len(text)) if len(tokenizer.encode(text[:n])) <= cut),
                key=len,
            )
        for chunk in (1, 3, 64):
            assert shown + streamed(tokenizer, before, after, chunk)[0] == text


def test_context_may_begin_inside_a_character():
    """A long prompt's first ids are not handed over."""
    for kind in ("byte-level", "byte-fallback", "sentencepiece", "rwkv-world"):
        tokenizer = tokenizer_of(kind)
        ids = tokenizer.encode("x" + "世界" * 5).tolist()
        after = tokenizer.encode("x世 ok").tolist()[-6:]
        expected = whole(tokenizer, ids, after)
        for cut in range(1, 7):
            assert streamed(tokenizer, ids[-cut:], after, 1)[0] == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ids"])
def test_stop_strings_end_text_and_ids_alike_at_every_burst(kind):
    tokenizer = tokenizer_of(kind)
    rng = np.random.default_rng(1)
    text = "the cat the cat 你好你好 cat's mat. sat the cat."
    ids = tokenizer.encode(text).tolist()
    text = tokenizer.decode(ids)
    for _ in range(60):
        starts = rng.integers(1, len(text), 3)
        stop = (*tuple(text[s : s + int(rng.integers(1, 9))] for s in starts), "cat the dog")
        expected = None
        for chunk in (1, 2, 3, 7, 64):
            found = streamed(tokenizer, [], ids, chunk, stop)
            expected = expected or found
            assert found == expected
        shown, used, stopped = expected
        decoded = tokenizer.decode(ids[:used])
        if stopped:
            assert not any(s in shown for s in stop)
            assert any(text.startswith(s, len(shown)) for s in stop)
            if kind != "cleaned":  # there the last word is looked at later
                at = min(decoded.find(s) for s in stop if s in decoded)
                assert shown == decoded[:at]
        else:
            assert shown == text


def test_stop_strings_that_overlap_and_repeat():
    tokenizer = CharTokenizer("abcdUPDATE>\n")
    for text, stop, shown, used in (
        ("ab>>>>UPDATED\n", (">>UPDATED", ">>UPDATED\n"), "ab>>", 13),
        ("abababad", ("abad",), "abab", 8),
        ("abcd", ("cd", "bcd"), "a", 4),
        ("abcd", ("d", "ab"), "", 2),
        ("aaaab", ("aab",), "aa", 5),
    ):
        for chunk in (1, 2, 3, 32):
            assert streamed(tokenizer, [], tokenizer.encode(text), chunk, stop) == (
                shown,
                used,
                True,
            )


def test_long_stop_strings_and_long_runs_take_linear_time():
    tokenizer = CharTokenizer("ab")
    stop = ("a" * 100_000 + "b", "a" * 50_000 + "bb", ("ab" * 30_000) + "b")
    times = []
    for n in (30_000, 120_000):
        began = time.thread_time()  # of this thread alone
        assert streamed(tokenizer, [], [0] * n, 32, stop)[0] == "a" * n
        times.append(time.thread_time() - began)
    assert times[1] < 12 * times[0]  # 4 times as long a text; 16 if it were quadratic
