"""Synthetic tasks: sequences of which a few positions have an answer that must be remembered.

    generate(rng, batch, length) -> tokens, targets        both [batch, length] int32

targets[b, t] is the answer after tokens[b, :t + 1], -1 where none is asked. `draw` gives the
training and the test sequences of a task, which never overlap. NumPy only.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np

BLANK = 0


class Task(NamedTuple):
    """A task and the size at which it is asked.

    Attributes:
        about: what has to be done.
        generate: as the module says; deterministic in its rng.
        vocab_size: token ids are below it.
        length: of a sequence.
    """

    about: str
    generate: Callable
    vocab_size: int
    length: int


def draw(generate, *, split, seed, index, batch, length):
    """Batch number `index` of a task's "train" or "test" sequences.

    An eighth of all sequences is for tests, told by a hash: no sequence is ever in both splits.

    Args:
        generate: of a Task.
        split: "train" or "test".
        seed, index: whole numbers >= 0; equal ones give equal batches, others independent ones.
        batch, length: rows, and tokens in each.

    Returns:
        tokens, targets: [batch, length] int32.
    """
    rng = np.random.default_rng([seed, index, split == "test"])
    weights = np.random.default_rng(0).integers(2**64, size=length, dtype=np.uint64)
    drawn, rows = [], 0
    while rows < batch:
        pair = np.stack(generate(rng, batch, length))  # [2, batch, length]
        code = (pair[0].astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)  # wraps
        drawn.append(pair[:, (code >> np.uint64(61) == 0) == (split == "test")])
        rows += drawn[-1].shape[1]
    tokens, targets = np.concatenate(drawn, axis=1)[:, :batch]
    return tokens, targets


def recall(rng, batch, length, *, pairs, vocab_size=8192, power=0.01):
    """Multi-query associative recall (Zoology, Arora et al. 2023, arXiv:2312.04927).

    `pairs` distinct keys, each followed by its value, then each key once more: there its value is
    the answer. The i-th place for a query, every second one after the pairs, is drawn with
    probability proportional to i^(power - 1): most queries come soon. The rest is blank.

    Keys are ids 1 .. vocab_size / 2 - 1, values the upper half; distinct within a sequence.
    """
    half = vocab_size // 2
    keys = 1 + _distinct(rng, half - 1, (batch, pairs))
    values = half + _distinct(rng, vocab_size - half, (batch, pairs))
    tokens, targets = _nothing(batch, length)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    # The largest of log p + Gumbel noise are a sample without replacement.
    places = (length - 2 * pairs) // 2
    scores = (power - 1) * np.log(np.arange(1, places + 1)) + rng.gumbel(size=(batch, places))
    place = 2 * pairs + 2 * np.argsort(-scores, axis=1)[:, :pairs]
    np.put_along_axis(tokens, place, keys, axis=1)
    np.put_along_axis(targets, place, values, axis=1)
    return tokens, targets


def selective_copy(rng, batch, length, *, copied=16, vocab_size=16):
    """Data at random places among blanks, then `copied` markers that ask for it in order.

    The task of Mamba (Gu & Dao 2023, arXiv:2312.00752). 1 is the marker, data are 2 and up.
    """
    tokens, targets = _nothing(batch, length)
    data = rng.integers(2, vocab_size, (batch, copied))
    place = np.sort(_distinct(rng, length - copied, (batch, copied)), axis=1)
    np.put_along_axis(tokens, place, data, axis=1)
    tokens[:, -copied:] = 1
    targets[:, -copied:] = data
    return tokens, targets


def induction(rng, batch, length, *, vocab_size=16):
    """Random tokens, one of them special (0); it comes again at the end: what followed it before?

    Induction heads as in H3 and Mamba (arXiv:2212.14052, 2312.00752).
    """
    tokens, targets = _nothing(batch, length)
    tokens[:] = rng.integers(1, vocab_size, (batch, length))
    place = rng.integers(0, length - 2, (batch, 1))
    np.put_along_axis(tokens, place, 0, axis=1)
    tokens[:, -1] = 0
    targets[:, -1] = np.take_along_axis(tokens, place + 1, axis=1)[:, 0]
    return tokens, targets


def adding(rng, batch, length):
    """Digits, one in each half of them marked: the sum of the two (Hochreiter & Schmidhuber 1997).

    Ids: 0 to 9 are digits, 10 to 19 marked digits, 20 asks, and 21 to 39 answer 0 to 18.
    """
    tokens, targets = _nothing(batch, length)
    half = (length - 1) // 2
    tokens[:, :-1] = rng.integers(0, 10, (batch, length - 1))
    marked = np.stack([rng.integers(0, half, batch), rng.integers(half, length - 1, batch)], 1)
    digits = np.take_along_axis(tokens, marked, axis=1)
    np.put_along_axis(tokens, marked, 10 + digits, axis=1)
    tokens[:, -1] = 20
    targets[:, -1] = 21 + digits.sum(axis=1)
    return tokens, targets


OPERATIONS = (max, min, lambda x: sum(x) % 10, lambda x: int(np.median(x)))
_CLOSE, _ASK = 15, 16


def listops(rng, batch, length):
    """The value of a nested expression such as [max 2 9 [min 4 7] 0] (Nangia & Bowman 2018).

    Ids: 0 is blank, 1 to 10 are the digits 0 to 9, 11 to 14 open max, min, sum modulo 10 and median
    (rounded down), 15 closes, 16 asks. Blanks fill up on the left.
    """
    random = Random(int(rng.integers(2**63)))
    tokens, targets = _nothing(batch, length)
    for row in range(batch):
        expression, value = _expression(random, length - 1)
        tokens[row, -len(expression) - 1 :] = [*expression, _ASK]
        targets[row, -1] = 1 + value
    return tokens, targets


def _expression(random, room):
    """(ids, value) of an expression of at most `room` >= 4 ids with two to five arguments."""
    operation = random.randrange(len(OPERATIONS))
    ids, values = [11 + operation], []
    room -= 2  # for the two ends
    for others in reversed(range(random.randint(2, min(5, room)))):  # arguments still to come
        share = random.randint(1, room - others)
        if share < 4:
            value = random.randrange(10)
            argument = [1 + value]
        else:
            argument, value = _expression(random, share)
        ids += argument
        values.append(value)
        room -= len(argument)
    return [*ids, _CLOSE], OPERATIONS[operation](values)


def reversal(rng, batch, length, *, vocab_size=16):
    """Random tokens, then the same from last to first; the answer so far is given."""
    n = length // 2
    return _rewrite(rng, batch, length, n, np.arange(n)[::-1], vocab_size)


def skip_copy(rng, batch, length, *, vocab_size=16):
    """Random tokens, then the same without every third; the answer so far is given.

    Copying takes an exact memory, skipping a clock.
    """
    n = 3 * (length // 5)
    return _rewrite(rng, batch, length, n, np.flatnonzero(np.arange(n) % 3 < 2), vocab_size)


def _rewrite(rng, batch, length, n, order, vocab_size):
    """n data, the marker 1, then data[order], each asked for one place before it."""
    tokens, targets = _nothing(batch, length)
    data = rng.integers(2, vocab_size, (batch, n))
    marker = length - len(order)
    tokens[:, marker - n : marker] = data
    tokens[:, marker] = 1
    tokens[:, marker + 1 :] = data[:, order[:-1]]
    targets[:, marker:] = data[:, order]
    return tokens, targets


NEEDLES, KEY, VALUE = 4, 2, 2  # needles in a haystack, tokens of a key and of a value


def needle(rng, batch, length, *, haystack, vocab_size, questions=NEEDLES, repeats=0, depth=None):
    """A text with needles in it; at its end some of their keys again: what was the value of each?

    A needle is a mark that no text has, a key and a value. A question is a needle without the last
    token of its value: every token of a value is asked for, given those before it.

    Args:
        haystack: [n] int token ids below vocab_size - 1; a row reads on from a random place in it,
            round and round if it is short.
        vocab_size: the last id is the mark. Keys and values are random ids below it, the keys of a
            row distinct.
        questions: how many needles are asked for at the end, in random order.
        repeats: how many times needles come again, one or another, all over the text; of each that
            was there before, the value is asked for as well.
        depth: where the first one asked for lies, 0 at the start of the text to 1 at its end; None
            is anywhere.
    """
    mark, size = vocab_size - 1, 1 + KEY + VALUE
    text = length - questions * size + 1
    codes = _distinct(rng, mark**KEY, (batch, NEEDLES))
    keys = np.stack([codes // mark**i % mark for i in range(KEY)], axis=-1)  # [batch, NEEDLES, KEY]
    values = rng.integers(0, mark, (batch, NEEDLES, VALUE))
    marks = np.full((batch, NEEDLES, 1), mark)
    needles = np.concatenate([marks, keys, values], axis=-1)  # [batch, NEEDLES, size]
    start = rng.integers(len(haystack), size=(batch, 1))
    tokens, answers = _nothing(batch, length + 1)
    tokens[:, :text] = np.take(haystack, start + np.arange(text), mode="wrap")
    # Distinct slots keep needles apart. They lie in random order, so the first is asked for first.
    slot = _distinct(rng, text // size, (batch, NEEDLES + repeats))
    if depth is not None:
        wanted = round(depth * (text // size - 1))
        slot = np.where(slot == wanted, slot[:, :1], slot)
        slot[:, 0] = wanted
    which = np.tile(np.arange(NEEDLES), (batch, 1))  # needle in each slot
    which = np.append(which, rng.integers(NEEDLES, size=(batch, repeats)), axis=1)
    same = which[:, :, None] == which[:, None]
    known = (same & (slot[:, :, None] > slot[:, None])).any(axis=-1)  # it came before
    is_value = np.arange(size) > KEY
    place = (slot[..., None] * size + np.arange(size)).reshape(batch, -1)
    there = np.take_along_axis(needles, which[..., None], axis=1)
    asked = np.where(known[..., None] & is_value, there, -1)
    np.put_along_axis(tokens, place, there.reshape(batch, -1), axis=1)
    np.put_along_axis(answers, place, asked.reshape(batch, -1), axis=1)
    asked = needles[:, :questions]
    tokens[:, text:] = asked.reshape(batch, -1)
    answers[:, text:] = np.where(is_value, asked, -1).reshape(batch, -1)
    return tokens[:, :-1], answers[:, 1:]


def _nothing(batch, length):
    return np.full((batch, length), BLANK, np.int32), np.full((batch, length), -1, np.int32)


def _distinct(rng, below, shape):
    """int64 rows [batch, n], each n different numbers in 0 .. below - 1 in random order."""
    batch, n = shape
    if n * n > 4 * below:
        return np.argsort(rng.random((batch, below)), axis=1)[:, :n]
    rows, again = np.empty(shape, np.int64), np.ones(batch, bool)
    while again.any():  # n numbers differ with a chance of at least exp(-2)
        rows[again] = rng.integers(below, size=(again.sum(), n))
        ordered = np.sort(rows, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    return rows


TASKS = {
    "selective-copy": Task("copies 16 tokens scattered among blanks", selective_copy, 16, 256),
    "induction": Task("repeats what followed a token before", induction, 16, 256),
    "adding": Task("adds two marked digits", adding, 40, 128),
    "listops": Task("evaluates nested expressions", listops, 17, 64),
    "reversal": Task("reverses a sequence", reversal, 16, 64),
    "synergy": Task("copies all but every third token", skip_copy, 16, 80),
}
