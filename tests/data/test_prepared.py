"""Token shards as the text of a run: the batches of memory, in an order without a list."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.config import default_config, from_config_dict
from gt_jax.data import (
    Corpus,
    count_tokens,
    encode_corpus,
    evaluation_batches,
    load_corpus,
    load_prepared,
    make_batches,
    make_tokenizer,
    mapped,
    shards,
    sources,
)
from gt_jax.data.mapped import MappedTokens
from gt_jax.data.order import MixedWindows, permute, quotas
from gt_jax.data.preparing import prepare
from gt_jax.data.streams import MappedStream, Stream
from gt_jax.errors import InputError
from gt_jax.training.text import fingerprint, read_text

LETTERS = make_tokenizer("char97", Corpus("c", ("abcdefghijklmnopqrstuvwxyz ",), ()))


def write_text(folder, lengths, first="a"):
    """A .jsonl of documents of these lengths. Returns its path as text."""
    folder.mkdir()
    texts = ["".join(chr(97 + (i + n) % 26) for i in range(n)) for n in lengths]
    lines = [json.dumps({"text": first + text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(source, prepared folder): 90 documents in many small shards."""
    folder = tmp_path_factory.mktemp("prepared")
    lengths = np.random.default_rng(0).geometric(1 / 60, size=90).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT", 400)
        source = write_text(folder / "text", lengths)
        prepare(source, folder / "out", tokenizer=LETTERS, processes=1)
    return source, str(folder / "out")


@pytest.fixture(scope="module")
def both(prepared):
    """(tokens in memory, tokens on disk) of one text, split in the same way."""
    source, folder = prepared
    return encode_corpus(load_corpus(source), LETTERS), load_prepared(folder).tokens


def assert_same(batch, other):
    """Equal, with segment ids that change at the same places."""
    for name in ("inputs", "targets", "resets"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))
    for a, b in ((batch, other), (other, batch)):
        if a.segment_ids is None:
            assert b.segment_ids is None or not np.diff(b.segment_ids).any()
            return
    changes = [np.diff(x.segment_ids) != 0 for x in (batch, other)]
    np.testing.assert_array_equal(*changes)


def test_splits_are_those_of_the_text_in_memory(both):
    for split, on_disk in zip(*both):
        assert len(on_disk) == len(split) and count_tokens(on_disk) == count_tokens(split)
        for ids, expected in zip(on_disk, split):
            np.testing.assert_array_equal(ids, expected)
            assert ids.dtype == np.int32


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_anywhere_are_those_of_the_stream_in_memory(both, data):
    memory, disk = Stream(both[0].train), MappedStream(both[1].train)
    assert memory.size == disk.size
    length = data.draw(st.integers(1, 300))
    starts = data.draw(st.lists(st.integers(0, memory.size - 1), min_size=1, max_size=5))
    stops = np.full(len(starts), data.draw(st.integers(1, memory.size - 1)))
    same = {"resets": False, "crossing": True, "stops": stops}
    starts = np.array(starts)
    assert_same(disk.batch(starts, length, **same), memory.batch(starts, length, **same))


def test_tracks_and_evaluations_are_those_of_the_text_in_memory(both):
    shape = {"batch_size": 4, "seq_len": 13}
    memory, disk = (make_batches(tokens.train, order="tracks", **shape) for tokens in both)
    for _ in range(2 * memory.tokens_per_epoch // 52 + 1):
        assert_same(next(disk), next(memory))
    for carry in (False, True):
        for max_tokens in (0, 100):
            more = {"carry": carry, "max_tokens": max_tokens}
            memory, disk = (evaluation_batches(t.validation, **shape, **more) for t in both)
            assert len(memory) == len(disk)
            for batch, expected in zip(disk, memory):
                assert_same(batch, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 1000])
def test_the_permutation_is_one(size):
    keys = np.random.default_rng(size).integers(1 << 63, size=6, dtype=np.uint64)
    order = permute(np.arange(size), size, keys)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 100:
        other = permute(np.arange(size), size, keys + np.uint64(1))
        assert (order == other).mean() < 0.05 and (order == np.arange(size)).mean() < 0.05
        # Neighbours land independently: the mean distance of two places of n is n / 3.
        assert abs(np.abs(np.diff(order)).mean() / (size / 3) - 1) < 0.1


def test_every_epoch_reads_every_window_once_in_another_order(both):
    tokens = both[1].train
    batches = make_batches(tokens, order="windows", batch_size=4, seq_len=10, seed=1)
    windows = (tokens.size - 10) // 10
    starts = np.concatenate([batches._plan(0)[i] for i in range(3 * windows // 4 + 1)])
    epochs = [np.sort(starts[n * windows : (n + 1) * windows]) for n in range(3)]
    for epoch in epochs:
        assert (np.diff(epoch) == 10).all()
    assert len({int(epoch[0]) for epoch in epochs}) > 1
    assert not np.array_equal(starts[:windows], starts[windows : 2 * windows])


def test_the_order_of_rows_does_not_depend_on_how_many_are_in_a_batch():
    """Places are computed many batches at a time; their end falls elsewhere for each size."""
    parts = [(0, 5000, 0.75), (5000, 900, 0.25)]

    def rows(size):
        windows = MixedWindows(parts, size, 3, 5)
        return np.concatenate([windows.starts(n) for n in range(30_000 // size)])

    one_by_one = rows(1)
    for size in (7, 64, 4096, 30_000):
        at_once = rows(size)
        np.testing.assert_array_equal(at_once, one_by_one[: len(at_once)])


def test_a_step_is_found_from_its_position_alone_and_by_rows_of_each_host(both):
    shape = {"order": "windows", "batch_size": 4, "seq_len": 7, "seed": 3}
    batches = make_batches(both[1].train, **shape)
    seen, states = [], []
    for _ in range(2 * batches.tokens_per_epoch // 28 + 3):
        states.append(batches.state())
        seen.append(next(batches))
    json.dumps(states)
    hosts = [make_batches(both[1].train, **shape, rows=slice(n, n + 2)) for n in (0, 2)]
    for at in (0, len(seen) // 2, len(seen) - 1):
        batches.restore(states[at])
        assert_same(next(batches), seen[at])
        for host in hosts:
            host.restore(states[at])
        joined = [np.concatenate(fields) for fields in zip(*map(next, hosts))]
        np.testing.assert_array_equal(joined[0], seen[at].inputs)
    with pytest.raises(InputError, match="seed=4 differs from the checkpoint's 3"):
        make_batches(both[1].train, **shape | {"seed": 4}).restore(states[0])


def test_a_mixture_has_the_shares_of_its_weights_and_reads_each_source_whole(tmp_path):
    sizes = {"a": 400, "b": 90, "c": 300}
    for name, size in sizes.items():
        source = write_text(tmp_path / f"text-{name}", [size] * 20, first=name.upper())
        tokenizer = make_tokenizer("char", Corpus("", ("abcdefghijklmnopqrstuvwxyzABC",), ()))
        prepare(source, tmp_path / name, tokenizer=tokenizer, processes=1)
    source = ",".join(f"{tmp_path / name}:{w}" for name, w in zip(sizes, (5, 1.5, 3.5)))
    text = load_prepared(source)
    assert "50 % " in text.note and "15 % " in text.note
    batches = make_batches(text.tokens.train, order="windows", batch_size=16, seq_len=30)
    starts = np.concatenate([batches._plan(0)[i] for i in range(2500 // 4)])
    parts = text.tokens.train.parts
    source_of = np.searchsorted([first for first, *_ in parts], starts, "right") - 1
    shares = np.bincount(source_of) / len(starts)
    np.testing.assert_allclose(shares, [0.5, 0.15, 0.35], atol=0.01)
    for k, (first, size, _) in enumerate(parts):
        own = starts[source_of == k]
        assert own.min() >= first and own.max() + 30 < first + size
        windows = (size - 30) // 30
        assert len(np.unique(own[:windows])) == windows  # its first epoch
    full = MappedStream(text.tokens.train)
    inputs = full.batch(np.array([parts[1][0] - 5]), 10, resets=True, crossing=True)
    assert (np.diff(inputs.segment_ids) != 0).sum() == 1  # sources are documents apart
    capped = text.tokens.validation.head(200)
    assert [round(size / 200, 2) for _, size, _ in capped.parts] == [0.5, 0.15, 0.35]


def test_quotas_add_up_and_a_tiny_weight_is_refused():
    assert quotas([1, 1, 1]).sum() == 10_000 and quotas([0.9999, 0.0001]).tolist() == [9999, 1]
    with pytest.raises(InputError, match="weight of 1e-06 among 1, less than one row in 10,000"):
        quotas([1, 1e-6])


def test_memory_is_given_back_while_reading(prepared, monkeypatch):
    calls = []
    monkeypatch.setattr(mapped, "_RELEASE_AFTER", 10 * (mapped._READ_AHEAD + 36))
    monkeypatch.setattr(mapped, "release", lambda: calls.append(shards.release()))
    tokens = load_prepared(prepared[1]).tokens.train
    batches = make_batches(tokens, order="windows", batch_size=4, seq_len=7)
    for _ in range(9):
        next(batches)
    assert len(calls) == 3  # of 36 rows


# What a run reads.


def config_of(**changes):
    config = default_config()
    small = {"train.batch_size": 2, "train.seq_len": 8}
    config.update_from_flattened_dict(small | changes)
    return from_config_dict(config)


def test_a_run_reads_prepared_text_with_its_tokenizer(prepared, both):
    _, folder = prepared
    text = read_text(config_of(**{"data.source": folder}))
    assert text.tokenizer.to_dict() == LETTERS.to_dict()
    assert isinstance(text.tokens.train, MappedTokens)
    assert fingerprint(text.tokens) == fingerprint(both[1]) != fingerprint(both[0])
    halves = read_text(config_of(**{"data.source": folder, "data.validation_fraction": 0.5}))
    assert fingerprint(halves.tokens) != fingerprint(text.tokens)


def test_another_source_validates(prepared, tmp_path):
    source, folder = prepared
    (tmp_path / "held.txt").write_text("a text that is held out")
    held = str(tmp_path / "held.txt")
    whole = count_tokens(encode_corpus(Corpus("", load_corpus(source)[1], ()), LETTERS).train)
    for validation, size in ((held, 23), (folder, None)):
        changes = {"data.source": folder, "data.validation_source": validation}
        text = read_text(config_of(**changes))
        assert len(text.tokens.train) == 90 and count_tokens(text.tokens.train) > whole
        expected = size or count_tokens(text.tokens.train)
        assert count_tokens(text.tokens.validation) == expected
        too = "" if size else ", which trains too"
        assert text.corpus.note == f"validates on {validation}{too}"
    text = read_text(config_of(**{"data.source": source, "data.validation_source": held}))
    assert len(text.tokens.train) == 90 and len(text.tokens.validation) == 1
    assert text.corpus.note == f"validates on {held}"
    text = read_text(config_of(**{"data.source": source, "data.validation_source": source}))
    assert text.corpus.note.endswith(", 90 of 90 documents of which train too")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.tokenizer": "sentencepiece"}, "is not the char97 tokenizer of data.source=FOLDER;"),
        ({"data.tokenizer": "FILE"}, "have other tokenizers .*prepare both with one --tokenizer"),
        ({"data.split": "tracks"}, "data.split=tracks cuts text in memory"),
        ({"data.source": "FOLDER:1,FOLDER:2"}, "names .* twice; add its weights up"),
        ({"data.source": "FOLDER:1,FOLDER/../out:2"}, "names .*out twice; add its weights up"),
        ({"data.source": "FOLDER:1e308,OTHER:1e308"}, "weights add up to infinity; divide all"),
        ({"data.source": "FOLDER:1,FOLDER"}, "has no weight|no number|must be a number above 0"),
        ({"data.source": "FOLDER:0,TEXT:1"}, "weight '0' of .* must be a number above 0"),
        ({"data.source": "FOLDER:1,TEXT:1"}, "TEXT is no prepared folder; run `python -m gt_jax"),
        ({"data.source": "TEXT", "data.validation_source": "FOLDER"}, "is prepared and .* is not"),
        ({"data.validation_source": "nowhere"}, "data.validation_source='nowhere' is no file"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(changes, message, prepared, tmp_path):
    source, folder = prepared
    (tmp_path / "tokenizer.gt_jax.json").write_text(
        json.dumps(make_tokenizer("char", Corpus("", ("ab",), ())).to_dict())
    )
    other = str(tmp_path / "other")
    if "OTHER" in str(changes):
        shutil.copytree(folder, other)
    names = {"FOLDER": folder, "TEXT": source, "FILE": str(tmp_path), "OTHER": other}
    for word, path in names.items():
        changes = {name: value.replace(word, path) for name, value in changes.items()}
        message = message.replace(word, path)
    with pytest.raises(InputError, match=message) as found:
        read_text(config_of(**{"data.source": folder} | changes))
    assert "\n" not in str(found.value)
