"""Prepared folders that something happened to: every damage is one line, none is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gt_jax.data import Corpus, load_prepared, make_tokenizer, shards, sources
from gt_jax.data.preparing import prepare
from gt_jax.errors import InputError
from gt_jax.prepare import _report
from tests.data.test_prepared import LETTERS, write_text
from tests.hostile.mutations import mutate, mutate_json


@pytest.fixture
def broken(tmp_path):
    """A prepared folder of one shard, to be damaged."""
    source = write_text(tmp_path / "text", [5000, 3000])
    prepare(source, tmp_path / "out", tokenizer=LETTERS, processes=1)
    return tmp_path / "out"


def test_a_shard_cut_off_or_altered_is_named_with_the_place(broken):
    shard = broken / "train-00000.shard"
    data = shard.read_bytes()
    shard.write_bytes(data[:1000])
    with pytest.raises(InputError, match=r"train-00000.shard is cut off at byte 1,000 of 16,"):
        load_prepared(str(broken))
    shard.write_bytes(data + b"x")
    with pytest.raises(InputError, match=r"shard has bytes behind its end, from byte 16,"):
        load_prepared(str(broken))
    shard.write_bytes(data[:9000] + b"x" + data[9001:])
    with pytest.raises(InputError, match=r"shard is damaged between bytes 0 and 16,\d+: they are"):
        load_prepared(str(broken))  # to split it reads where documents end
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000.shard cannot be read \(No such file"):
        load_prepared(str(broken))


def test_every_block_of_a_shard_is_compared_with_its_checksum(tmp_path):
    source = write_text(tmp_path / "text", [90_000])  # 180 KB in blocks of 64 KiB
    prepare(source, tmp_path / "out", tokenizer=LETTERS, processes=1)
    assert shards.check_folder(tmp_path / "out") == 1
    path = tmp_path / "out" / "train-00000.shard"
    data = path.read_bytes()
    for place in (70_000, 140_000):
        path.write_bytes(data[:place] + b"x" + data[place + 1 :])
        with pytest.raises(InputError, match="is damaged between bytes"):
            shards.check_folder(tmp_path / "out")
        with pytest.raises(InputError, match="is damaged between bytes"):
            load_prepared(str(tmp_path / "out")).tokens.train[0]


def test_a_tokenizer_that_does_not_fit_the_shards_is_refused(broken):
    other = make_tokenizer("char", Corpus("", ("ab",), ())).to_dict()
    (broken / "tokenizer.gt_jax.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="is not the tokenizer that these shards were made with"):
        load_prepared(str(broken))


def test_a_damaged_index_is_refused(broken):
    index = json.loads((broken / "index.json").read_bytes())
    (record,) = index["shards"]
    of_shard = lambda **changes: json.dumps(index | {"shards": [record | changes]})
    damaged = ["{", "[]", json.dumps({name: z for name, z in index.items() if name != "note"})]
    fields = ("format", "2"), ("shards", 1), ("vocab_size", "97"), ("dtype", "int16")
    damaged += [json.dumps(index | {name: value}) for name, value in fields]
    damaged += [json.dumps(index | {"shards": [record, record]}), of_shard(split="test")]
    damaged += [of_shard(file="../out/" + record["file"]), of_shard(largest=None)]
    damaged += [of_shard(largest="9"), of_shard(open="no")]
    for text in damaged:
        (broken / "index.json").write_text(text)
        with pytest.raises(InputError, match=r"index.json (is|cannot)"):
            load_prepared(str(broken))


@pytest.mark.parametrize("more", [-1, 1])
def test_an_index_that_counts_other_tokens_is_refused(broken, more):
    """One token more or less: the file, filled up to 64 bytes, has the size that it should have."""
    index = json.loads((broken / "index.json").read_bytes())
    index["shards"][0]["tokens"] += more
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"8,004 tokens of whole documents, which does not fit"):
        load_prepared(str(broken))


def test_whether_a_document_continues_is_what_its_end_says(broken):
    index = json.loads((broken / "index.json").read_bytes())
    index["shards"][0]["open"] = True
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"does not fit the 8,004 tokens that index.json says"):
        load_prepared(str(broken))


def test_a_folder_whose_tokenizer_is_gone_is_refused(broken):
    (broken / "tokenizer.gt_jax.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.gt_jax.json cannot be read \(No such file"):
        load_prepared(str(broken))


def test_preparing_into_a_folder_with_a_damaged_index_is_one_line(broken):
    (broken / "index.json").write_text("{")
    source = str(broken.parent / "text")
    with pytest.raises(InputError, match=r"index.json cannot be read"):
        prepare(source, broken, tokenizer=LETTERS, processes=1)


FOLDERS = 120


def mutated(rng, path):
    """The bytes of a file with a few faults; of JSON, every other time, with one odd value."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        return json.dumps(mutate_json(rng, json.loads(data))).encode()
    return mutate(rng, data or b"\0")


def ids_of(folder):
    tokens = load_prepared(str(folder)).tokens
    return [ids.tolist() for split in tokens for ids in split]


def test_mutated_folders_are_one_line_or_read_as_they_were(broken):
    """By training, and by preparing the same text into the folder once more."""
    rng, source = np.random.default_rng(6), str(broken.parent / "text")
    whole = {path: path.read_bytes() for path in broken.iterdir()}
    ids, again = ids_of(broken), lambda: _report(prepare(source, broken, tokenizer=LETTERS), "", 1)
    for _ in range(FOLDERS):
        for path, data in whole.items():
            path.write_bytes(mutated(rng, path))
            for read in (lambda: ids_of(broken) == ids, again):
                try:
                    assert read()
                except InputError as error:
                    assert str(error).isprintable()
            path.write_bytes(data)


def test_work_that_was_damaged_while_it_was_interrupted_is_done_again(tmp_path, monkeypatch):
    """Every file that a killed preparation leaves: the end is the same bytes, or one line."""
    monkeypatch.setattr(sources, "UNIT", 4000)
    rng, source = np.random.default_rng(7), write_text(tmp_path / "text", [5000, 3000])
    go = lambda target: prepare(source, target, tokenizer=LETTERS, processes=1)
    go(tmp_path / "whole")
    bytes_of = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    end = Path.replace

    def die(path, target):
        if Path(target).parent == tmp_path / "killed":
            raise KeyboardInterrupt
        return end(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die)  # when all shards are written and none has moved
        go(tmp_path / "killed")
    left = tmp_path / "killed" / "unfinished"
    assert len(list(left.glob("*.shard"))) >= 2
    redone = 0
    for path in sorted(left.iterdir()):
        for kind in ("cut", "missing", *range(8)):
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "killed", run)
            file, data = run / "unfinished" / path.name, path.read_bytes()
            file.unlink()
            if kind != "missing":
                file.write_bytes(data[: len(data) // 2] if kind == "cut" else mutated(rng, path))
            try:
                go(run)
                assert bytes_of(run) == bytes_of(tmp_path / "whole")
                redone += 1
            except InputError as error:
                assert str(error).isprintable()
                assert path.name in ("begun.json", "tokenizer.gt_jax.json"), error
            shutil.rmtree(run)
    assert redone > 20
