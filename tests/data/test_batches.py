import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.data import (
    CorpusTokens,
    evaluation_batches,
    make_batches,
    track_split,
)
from gt_jax.errors import InputError


def documents_of(*lengths):
    """Documents whose tokens count up through all of them, so that a token is its own position."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def owner(lengths):
    """The document of every position, by a plain loop."""
    return [i for i, n in enumerate(lengths) for _ in range(n)]


def take(batches, n):
    return [next(batches) for _ in range(n)]


def assert_same(batch, other):
    for a, b in zip(batch, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("order", ["windows", "tracks"])
def test_rows_are_the_stream_and_targets_the_next_token_of_the_same_document(order):
    lengths = (30, 1, 17, 52)
    document = owner(lengths)
    batches = make_batches(documents_of(*lengths), order=order, batch_size=3, seq_len=7, seed=1)
    for inputs, targets, segment_ids, _ in take(batches, 30):
        assert inputs.dtype == targets.dtype == segment_ids.dtype == np.int32
        assert inputs.shape == targets.shape == segment_ids.shape == (3, 7)
        for row in range(3):
            start = inputs[row, 0]
            for t in range(7):
                here = start + t
                assert inputs[row, t] == here
                same = here + 1 < 100 and document[here + 1] == document[here]
                assert targets[row, t] == (here + 1 if same else -1)
                assert segment_ids[row, t] == document[here]


def test_windows_of_an_epoch_are_disjoint_and_cover_all_but_the_ends():
    batches = make_batches(documents_of(1001), order="windows", batch_size=4, seq_len=10)
    assert batches.tokens_per_epoch == 1000 - 40 or batches.tokens_per_epoch == 1000
    seen = np.concatenate(
        [b.targets.ravel() for b in take(batches, batches.tokens_per_epoch // 40)]
    )
    assert len(set(seen)) == len(seen) == batches.tokens_per_epoch


def test_windows_change_phase_and_order_with_epoch_and_seed():
    def epoch_starts(seed, epochs):
        batches = make_batches(
            documents_of(810), order="windows", batch_size=2, seq_len=8, seed=seed
        )
        state = batches.state()
        starts = []
        for epoch in range(epochs):
            batches.restore({**state, "epoch": epoch})
            starts.append(np.concatenate([b.inputs[:, 0] for b in take(batches, 50)]))
        return starts

    first, second, *_ = epoch_starts(0, 6)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_starts(1, 1)[0])
    np.testing.assert_array_equal(first, epoch_starts(0, 1)[0])
    assert len({int(s[0]) % 8 for s in epoch_starts(0, 6)}) > 1


def test_no_window_continues_another():
    batches = make_batches(documents_of(100), order="windows", batch_size=3, seq_len=7)
    assert all(b.resets.dtype == bool and b.resets.all() for b in take(batches, 10))


def test_windows_repeat_when_fewer_than_a_batch():
    batches = make_batches(documents_of(9), order="windows", batch_size=4, seq_len=8)
    assert all((b.inputs == np.arange(8)).all() for b in take(batches, 3))


def test_tracks_continue_from_batch_to_batch_and_reset_with_the_epoch():
    batches = make_batches(documents_of(4 * 50 + 3), order="tracks", batch_size=4, seq_len=8)
    per_epoch = 6  # 49 targets in a track of 50
    assert batches.tokens_per_epoch == per_epoch * 4 * 8
    run = take(batches, 2 * per_epoch)
    for i, batch in enumerate(run):
        expected = np.arange(4)[:, None] * 50 + i % per_epoch * 8 + np.arange(8)
        np.testing.assert_array_equal(batch.inputs, expected)
        np.testing.assert_array_equal(batch.resets, np.full(4, i % per_epoch == 0))
        assert batch.segment_ids is None


def test_tracks_are_reset_where_a_batch_begins_with_a_document():
    lengths = (24, 40, 36)
    batches = make_batches(documents_of(*lengths), order="tracks", batch_size=2, seq_len=8)
    begins = {0, 24, 64}
    for i, batch in enumerate(take(batches, 6)):
        for start, resets in zip(batch.inputs[:, 0], batch.resets, strict=True):
            assert resets == (i == 0 or int(start) in begins)


@pytest.mark.parametrize("order", ["windows", "tracks"])
@pytest.mark.parametrize("steps", [0, 1, 5, 23])
def test_restored_batches_go_on_bit_for_bit(order, steps):
    def new_iterator():
        return make_batches(documents_of(70, 90), order=order, batch_size=2, seq_len=9, seed=4)

    batches = new_iterator()
    take(batches, steps)
    state = json.loads(json.dumps(batches.state()))
    resumed = new_iterator()
    resumed.restore(state)
    for batch, other in zip(take(batches, 20), take(resumed, 20), strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(batch_size=3), "train.batch_size=3"),
        (dict(seq_len=8), "train.seq_len=8"),
        (dict(seed=5), "seed=5"),
        (dict(order="tracks"), "data.order=tracks"),
    ],
)
def test_restoring_into_another_setting_is_refused(change, field):
    setting = dict(order="windows", batch_size=2, seq_len=9, seed=4)
    state = make_batches(documents_of(100), **setting).state()
    with pytest.raises(InputError, match=field):
        make_batches(documents_of(100), **(setting | change)).restore(state)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 12),
    carry=st.booleans(),
)
def test_evaluation_counts_every_target_once(lengths, batch_size, seq_len, carry):
    if sum(lengths) < 2:
        return
    batches = evaluation_batches(
        documents_of(*lengths), batch_size=batch_size, seq_len=seq_len, carry=carry
    )
    document = owner(lengths)
    expected = [p for p in range(1, sum(lengths)) if document[p] == document[p - 1]]
    counted = []
    for inputs, targets, segment_ids, _ in batches:
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        counts = targets >= 0
        np.testing.assert_array_equal(targets[counts], inputs[counts] + 1)
        counted += targets[counts].tolist()
        for row in range(batch_size):
            seen = inputs[row][counts[row]]
            if segment_ids is None:
                assert len({document[p] for p in seen}) <= 1
            else:
                assert [document[p] for p in seen] == segment_ids[row][counts[row]].tolist()
    assert sorted(counted) == expected


def test_evaluation_windows_do_not_depend_on_the_batch_size():
    def rows(batch_size):
        batches = evaluation_batches(documents_of(50, 53), batch_size=batch_size, seq_len=8)
        kept = [r for b in batches for r in zip(*b, strict=True) if (r[1] >= 0).any()]
        return [[np.asarray(x).tolist() for x in row] for row in kept]

    assert rows(1) == rows(3) == rows(64)


def test_evaluation_stops_after_max_tokens():
    batches = evaluation_batches(documents_of(500), batch_size=4, seq_len=8, max_tokens=100)
    counted = np.concatenate([b.targets[b.targets >= 0] for b in batches])
    np.testing.assert_array_equal(np.sort(counted), np.arange(1, 101))


def test_carried_evaluation_rows_continue_from_batch_to_batch():
    batches = evaluation_batches(documents_of(203), batch_size=4, seq_len=8, carry=True)
    starts = np.stack([b.inputs[:, 0] for b in batches])
    for row in range(4):
        live = [i for i, b in enumerate(batches) if (b.targets[row] >= 0).any()]
        np.testing.assert_array_equal(np.diff(starts[live, row]), 8)
    assert [b.resets.tolist() for b in batches] == [[i == 0] * 4 for i in range(len(batches))]


def test_track_split_takes_the_end_of_every_track():
    tokens = CorpusTokens(*(tuple(documents_of(901, 102)[i : i + 1]) for i in range(2)))
    train, validation = track_split(tokens, batch_size=10)
    for b in range(10):
        np.testing.assert_array_equal(train[b], np.arange(b * 100, b * 100 + 90))
        np.testing.assert_array_equal(validation[b], np.arange(b * 100 + 90, b * 100 + 100))


@pytest.mark.parametrize(
    "batch_size, seq_len, track, train_steps, validation_steps",
    [(64, 64, 17_428, 245, 27), (32, 64, 34_856, 490, 54), (4, 256, 278_848, 980, 108)],
)
def test_track_split_of_tiny_shakespeare_has_its_known_steps(
    batch_size, seq_len, track, train_steps, validation_steps
):
    text = np.zeros(1_115_394, np.int32)
    tokens = track_split(CorpusTokens((text[:1_003_854],), (text[1_003_854:],)), batch_size)
    assert len(tokens.train[0]) + len(tokens.validation[0]) == track
    for documents, steps in zip(tokens, (train_steps, validation_steps), strict=True):
        batches = make_batches(documents, order="tracks", batch_size=batch_size, seq_len=seq_len)
        assert batches.tokens_per_epoch == steps * batch_size * seq_len
        assert next(batches).segment_ids is None


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match=r"train.seq_len=8 needs 9 .* has 8; lower it, or"):
        make_batches(documents_of(8), order="windows", batch_size=1, seq_len=8)
    with pytest.raises(
        InputError, match=r"train.seq_len=8 needs 36 .*lower it or train.batch_size"
    ):
        make_batches(documents_of(35), order="tracks", batch_size=4, seq_len=8)
    with pytest.raises(InputError, match="has 1 validation tokens"):
        evaluation_batches(documents_of(1), batch_size=1, seq_len=8)
    with pytest.raises(InputError, match=r"train.batch_size=64"):
        track_split(CorpusTokens((np.arange(100, dtype=np.int32),), ()), batch_size=64)


def test_an_unknown_order_is_refused():
    with pytest.raises(InputError, match=r"data.order='random' must be one of windows, tracks"):
        make_batches(documents_of(100), order="random", batch_size=1, seq_len=8)
