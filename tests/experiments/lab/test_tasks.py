"""Every task has the answers that a solver reading the sequence alone finds, and only those."""

import functools
import itertools
import statistics

import numpy as np
import pytest

from experiments.lab import tasks

VOCABULARY = 40
TEXT = np.arange(500) * 7 % (VOCABULARY - 1)
TEXT_TASK = functools.partial(tasks.needle, haystack=TEXT, vocab_size=VOCABULARY)


def solve_recall(row, vocab_size=8192):
    """A key before a value is kept, any other key asks for what was kept."""
    kept, answers = {}, {}
    for t, token in enumerate(row):
        is_key = 0 < token < vocab_size // 2
        if is_key and t + 1 < len(row) and row[t + 1] >= vocab_size // 2:
            kept[token] = row[t + 1]
        elif is_key:
            answers[t] = kept[token]
    return answers


def solve_selective_copy(row):
    data = [token for token in row if token > 1]
    markers = [t for t, token in enumerate(row) if token == 1]
    return dict(zip(markers, data, strict=True))


def solve_induction(row):
    first, last = (t for t, token in enumerate(row) if token == 0)
    assert last == len(row) - 1
    return {last: row[first + 1]}


def solve_adding(row):
    first, second = (t for t, token in enumerate(row) if 10 <= token < 20)
    assert first < (len(row) - 1) // 2 <= second
    assert row[-1] == 20
    return {len(row) - 1: 21 + row[first] - 10 + row[second] - 10}


def solve_listops(row):
    """Innermost brackets first, on the printed expression."""
    *expression, ask = [int(token) for token in row if token]
    assert ask == 16
    stack = []
    for token in expression:
        if token != 15:
            stack.append(token - 1 if token <= 10 else f"open {token}")
            continue
        arguments = []
        while isinstance(stack[-1], int):
            arguments.append(stack.pop())
        assert 2 <= len(arguments) <= 5
        operation = {
            "open 11": max,
            "open 12": min,
            "open 13": lambda values: sum(values) % 10,
            "open 14": lambda values: int(statistics.median(values)),
        }[stack.pop()]
        stack.append(operation(arguments))
    (value,) = stack
    return {len(row) - 1: 1 + value}


def solve_rewriting(keep):
    """Data in another order after the marker; what follows the marker is the answer so far."""

    def solve(row):
        row = [int(token) for token in row]
        marker = row.index(1)
        answer = keep([token for token in row[:marker] if token])
        assert row[marker + 1 :] == answer[:-1]
        return {marker + i: token for i, token in enumerate(answer)}

    return solve


def solve_needle(row):
    """A mark with a key that was there before asks for the two tokens that came after it then."""
    row = [int(token) for token in row]
    values, answers = {}, {}
    for t in (t for t, token in enumerate(row) if token == VOCABULARY - 1):
        key, value = tuple(row[t + 1 : t + 3]), row[t + 3 : t + 5]
        if key in values:
            answers |= {t + 2: values[key][0], t + 3: values[key][1]}
            assert value == values[key][: len(value)]
        values[key] = value
    return answers


# name -> (generator, lengths, solver, answers in a row if always as many)
CASES = {
    "recall, few": (functools.partial(tasks.recall, pairs=4), (64,), solve_recall, 4),
    "recall, many": (functools.partial(tasks.recall, pairs=64), (256, 512), solve_recall, 64),
    "selective-copy": (tasks.selective_copy, (64, 256), solve_selective_copy, 16),
    "induction": (tasks.induction, (3, 256), solve_induction, 1),
    "adding": (tasks.adding, (3, 4, 128), solve_adding, 1),
    "listops": (tasks.listops, (5, 17, 64), solve_listops, 1),
    "reversal": (tasks.reversal, (64, 65), solve_rewriting(lambda data: data[::-1]), 32),
    "synergy": (
        tasks.skip_copy,
        (80, 83),
        solve_rewriting(lambda data: [x for i, x in enumerate(data) if (i + 1) % 3]),
        32,
    ),
    "needle": (TEXT_TASK, (48, 300), solve_needle, 8),
    "needle, repeated": (functools.partial(TEXT_TASK, repeats=5), (80, 300), solve_needle, None),
    "needle, one question": (
        functools.partial(TEXT_TASK, questions=1),
        (32, 300),
        solve_needle,
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_a_solver_finds(name):
    generate, lengths, solve, answers = CASES[name]
    for length in lengths:
        tokens, targets = generate(np.random.default_rng(3), 50, length)
        assert tokens.shape == targets.shape == (50, length)
        assert tokens.dtype == targets.dtype == np.int32
        if answers is not None:
            assert ((targets >= 0).sum(axis=1) == answers).all()
        for row, asked in zip(tokens, targets):
            expected = np.full(length, -1)
            for t, answer in solve(row).items():
                expected[t] = answer
            np.testing.assert_array_equal(asked, expected)


def test_listed_tasks_are_tested_and_stay_in_their_vocabulary():
    for name, task in tasks.TASKS.items():
        assert CASES[name][0] is task.generate
        tokens, targets = task.generate(np.random.default_rng(0), 200, task.length)
        assert tokens.min() >= 0
        assert max(tokens.max(), targets.max()) < task.vocab_size


@pytest.mark.parametrize("name", CASES)
def test_splits_repeat_and_never_meet(name):
    generate, lengths, *_ = CASES[name]
    length = lengths[-1]  # at small ones a task has few sequences
    draw = functools.partial(tasks.draw, generate, seed=5, batch=200, length=length)
    train, test = draw(split="train", index=0), draw(split="test", index=0)
    for one, two in zip(train, draw(split="train", index=0)):
        np.testing.assert_array_equal(one, two)
    assert train[0].shape == test[0].shape == (200, length)
    rows = lambda pair: {row.tobytes() for row in pair[0]}
    assert not rows(train) & rows(test)
    assert rows(train) != rows(draw(split="train", index=1))
    assert rows(train) != rows(draw(split="train", index=0, seed=6))


def test_queries_of_recall_follow_a_power_law():
    """First places of queries, one pair a row: frequencies as the formula has them."""
    tokens, _ = tasks.recall(np.random.default_rng(0), 20_000, 34, pairs=1, vocab_size=64)
    place = np.argmax(tokens[:, 2::2] > 0, axis=1)
    expected = np.arange(1, 17) ** -0.99
    found = np.bincount(place, minlength=16) / len(place)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.01)


def test_listops_nests():
    tokens, _ = tasks.listops(np.random.default_rng(0), 200, 64)
    opens = np.isin(tokens, range(11, 15))
    depth = (np.cumsum(opens, axis=1) - np.cumsum(tokens == 15, axis=1)).max(axis=1)
    assert np.median(depth) >= 3
    assert np.mean(tokens[:, 32] > 0) > 0.5  # most fill more than half of the row


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_lies_at_its_depth_in_the_text(depth):
    generate = functools.partial(TEXT_TASK, depth=depth, questions=1)
    for row in generate(np.random.default_rng(0), 100, 1000)[0]:
        row = [int(token) for token in row]
        *marks, last = [t for t, token in enumerate(row) if token == VOCABULARY - 1]
        assert len(marks) == tasks.NEEDLES
        (asked,) = [t for t in marks if row[t + 1 : t + 3] == row[last + 1 : last + 3]]
        assert asked / (last - 5) == pytest.approx(depth, abs=0.01)


def test_haystack_is_the_text():
    tokens, _ = TEXT_TASK(np.random.default_rng(0), 100, 300)
    follows = dict(itertools.pairwise(TEXT))
    pairs = [(a, b) for row in tokens for a, b in itertools.pairwise(row)]
    assert np.mean([follows.get(a) == b for a, b in pairs]) > 0.8
