"""Prepared folders that something happened to: every damage is one line, none is read."""

import json

import pytest

from gt_jax.data import Corpus, load_prepared, make_tokenizer, shards
from gt_jax.data.preparing import prepare
from gt_jax.errors import InputError
from tests.data.test_prepared import LETTERS, write_text


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
