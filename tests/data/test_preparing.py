"""Text to token shards: what is read and skipped, and the same bytes however it was interrupted."""

import gzip
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gt_jax.data import encode_corpus, load_corpus, make_tokenizer, reading, shards, sources
from gt_jax.data.learned import train_tokenizer
from gt_jax.data.mapped import MappedTokens
from gt_jax.data.preparing import prepare
from gt_jax.data.shards import check_folder, open_prepared
from gt_jax.errors import InputError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def small(monkeypatch):
    """Units, blocks of text and checksums so small that a few kilobytes have many."""
    monkeypatch.setattr(sources, "UNIT", 3000)
    monkeypatch.setattr(reading, "BLOCK", 200)
    monkeypatch.setattr(shards, "_BLOCK", 256)


def text_of(rng, words):
    word = lambda: "".join(rng.choices("abcdefgh é漢😀", k=rng.randint(1, 9)))
    return "".join(word() + rng.choice([" ", " ", "\n", "\r\n", ""]) for _ in range(words)) + "."


def write_folder(folder, *, bad=False):
    """Documents of every kind and length. Returns the folder."""
    rng = random.Random(0)
    (folder / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": text_of(rng, rng.choice([1, 5, 200]))}) for _ in range(60)]
    if bad:
        lines[5:5] = ['{"text": 1}', "{broken", '{"text": " "}', '{"text": "\\ud83d"}']
    (folder / "a.jsonl").write_text("\n".join([*lines, "", ""]), "utf-8")
    (folder / "long.txt").write_text(text_of(rng, 4000), "utf-8")
    (folder / "no_line.txt").write_text("漢é" * 2000, "utf-8")
    (folder / "short.txt").write_text("\ufeffshort\r\n", "utf-8")
    (folder / "sub" / "packed.txt.gz").write_bytes(gzip.compress(text_of(rng, 900).encode()))
    packed = "".join(json.dumps({"text": text_of(rng, 20)}) + "\n" for _ in range(20)).encode()
    (folder / "sub" / "rows.jsonl.gz").write_bytes(gzip.compress(packed))
    if bad:
        (folder / "README.md").write_text("no text to train on")
        (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def documents_of(folder, split="train"):
    return list(MappedTokens.of_shards(open_prepared(folder).shards[split]))


def assert_same(documents, expected):
    assert len(documents) == len(expected)
    for ids, wanted in zip(documents, expected):
        np.testing.assert_array_equal(ids, wanted)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_and_ids_are_those_of_the_text_in_memory(small, tmp_path):
    folder = write_folder(tmp_path / "text")
    corpus = load_corpus(str(folder))
    tokenizer = make_tokenizer("char97", corpus)
    index = prepare(str(folder), tmp_path / "out", tokenizer=tokenizer, processes=1)
    tokens = encode_corpus(corpus, tokenizer)
    assert_same(documents_of(tmp_path / "out"), [*tokens.train, *tokens.validation])
    assert len(index["shards"]) > 10
    assert (
        sum(s["documents"] for s in index["shards"])
        == 84
        == sum(s["ends"] for s in index["shards"])
    )
    assert sum(s["characters"] for s in index["shards"]) == sum(
        map(len, corpus.train + corpus.validation)
    )
    assert check_folder(tmp_path / "out") == len(index["shards"])
    shard = index["shards"][0]
    plain = np.memmap(tmp_path / "out" / shard["file"], "<u2", shape=shard["tokens"])
    np.testing.assert_array_equal(plain[:30], tokens.train[0][:30])


@pytest.mark.parametrize("end", ["b" * 50 + "\n", "漢" * 40, "b" * 20, "漢" * 6 + "b" + "漢"])
def test_a_cut_near_the_end_of_a_text_loses_no_document(end, small, tmp_path):
    (tmp_path / "text").mkdir()
    first = "a\n" * 1490 + end  # the cut falls into its last line
    for name, text in (("a.txt", first), ("b.txt", "another")):
        (tmp_path / "text" / name).write_text(text, "utf-8")
    tokenizer = make_tokenizer("char", load_corpus(str(tmp_path / "text")))
    prepare(str(tmp_path / "text"), tmp_path / "out", tokenizer=tokenizer, processes=1)
    assert_same(documents_of(tmp_path / "out"), [tokenizer.encode(t) for t in (first, "another")])


def test_named_splits_are_kept_and_test_is_left_out(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "a.txt").write_text(f"{name} text")
    tokenizer = make_tokenizer("char", load_corpus(str(tmp_path / "text")))
    out = tmp_path / "out"
    index = prepare(str(tmp_path / "text"), out, tokenizer=tokenizer, processes=1)
    decode = lambda split: [tokenizer.decode(ids) for ids in documents_of(out, split)]
    assert decode("train") == ["train text"] and decode("validation") == ["valid text"]
    assert index["skipped_files"] == {"test/a.txt": "belongs to the test split"}


@pytest.mark.parametrize("name", ["a.ndjson", "a.json"])
def test_other_names_of_json_lines_are_read_as_they_are(name, tmp_path):
    (tmp_path / name).write_text('{"text": "first"}\n{"text": "second"}\n')
    tokenizer = make_tokenizer("char97", load_corpus("shakespeare"))
    prepare(str(tmp_path / name), tmp_path / "out", tokenizer=tokenizer, processes=1)
    ids = documents_of(tmp_path / "out")
    found = [tokenizer.decode(each[:-1]) for each in ids]  # without what ends it
    assert found == ["first", "second"]


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_tables_are_read_as_text_is(kind, small, tmp_path):
    pytest.importorskip("pyarrow", reason="tables need it")
    import pyarrow
    from pyarrow import ipc, parquet

    texts = [f"row number {n}\n" * (n % 7) for n in range(300)]
    table = pyarrow.table({"id": list(range(300)), "text": texts})
    folder = tmp_path / "text" / "train"
    folder.mkdir(parents=True)
    if kind == "parquet":
        parquet.write_table(table, folder / "a.parquet", row_group_size=40)
    else:  # the layout of datasets.DatasetDict.save_to_disk
        with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=40)
        (folder / "state.json").write_text("{}")
    corpus = load_corpus("shakespeare")._replace(train=tuple(t for t in texts if t), validation=())
    tokenizer = make_tokenizer("char97", corpus)
    index = prepare(str(tmp_path / "text"), tmp_path / "out", tokenizer=tokenizer, processes=1)
    assert_same(documents_of(tmp_path / "out"), encode_corpus(corpus, tokenizer).train)
    assert index["skipped_documents"] == {"empty": 43}
    with pytest.raises(InputError, match=r"no text in data.field='body'; name one of .*: id, text"):
        prepare(str(folder), tmp_path / "o", tokenizer=tokenizer, field="body", processes=1)


def test_what_cannot_be_read_is_counted_with_the_first_example(small, tmp_path):
    folder = write_folder(tmp_path / "text", bad=True)
    tokenizer = train_tokenizer(
        "char97", str(folder), sources.plan(str(folder), "text"), vocab_size=0, field="text"
    )
    index = prepare(str(folder), tmp_path / "out", tokenizer=tokenizer, processes=1)
    assert index["skipped_documents"] == {"unreadable": 4, "empty": 1}
    assert "a.jsonl at byte" in index["first_skipped"]["unreadable"]
    assert index["skipped_files"] == {"README.md": "is no text, JSONL, Parquet or Arrow file"}
    assert sum(shard["documents"] for shard in index["shards"]) == 84


KILLED = """
import os, signal, sys
from gt_jax.data import sources
from gt_jax.data.preparing import prepare
from gt_jax.data.learned import train_tokenizer
sources.UNIT = 3000
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
make = lambda work: train_tokenizer("bpe", sys.argv[1], work, vocab_size=300, field="text")
prepare(sys.argv[1], sys.argv[2], tokenizer="bpe of 300", make_tokenizer=make, progress=progress,
        processes=1)
"""


def test_killed_five_times_it_ends_with_the_same_bytes(tmp_path):
    folder = write_folder(tmp_path / "text")

    def run(target, kill_at):
        command = [sys.executable, "-c", KILLED, folder, tmp_path / target, str(kill_at)]
        return subprocess.run(command, cwd=ROOT).returncode

    assert run("undisturbed", -1) == 0
    for kill_at in (1, 2, 4, 3, 5):  # after 0, 1, 3, 2, 4 reads
        assert run("killed", kill_at) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "index.json").exists()
        with pytest.raises(InputError, match="is not prepared to the end; run the same"):
            open_prepared(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "unfinished").glob("train-*.json"))) > 2
    assert run("killed", -1) == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "undisturbed")


def test_the_number_of_processes_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "UNIT", 3000)  # workers are told their units
    folder = write_folder(tmp_path / "text")
    tokenizer = make_tokenizer("char", load_corpus(str(folder)))
    assert len(sources.plan(str(folder), "text").units) > 4
    for processes in (1, 2):
        target = tmp_path / str(processes)
        prepare(str(folder), target, tokenizer=tokenizer, processes=processes)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_a_finished_folder_is_left_as_it_is_and_another_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    tokenizer = make_tokenizer("char", load_corpus(str(tmp_path / "a.txt")))
    out, source = tmp_path / "out", str(tmp_path / "a.txt")
    again = lambda **changes: prepare(
        source, out, **{"tokenizer": tokenizer, "processes": 1} | changes
    )
    assert again() == again()
    with pytest.raises(InputError, match="was begun with field=text, not body; name another"):
        again(field="body")
    with pytest.raises(InputError, match="was begun with tokenizer="):
        again(tokenizer="bpe of 300 ids")
    (tmp_path / "a.txt").write_text("some other text")
    with pytest.raises(InputError, match=r"held another a?.*; name another folder"):
        again()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no file of .txt, .jsonl, .ndjson, .parquet or .arrow; add one"),
        ({"a.md": b"x"}, "holds no file of"),
        ({"a.txt": b" \n"}, "holds no text to train on: .*a.txt is empty"),
        ({"a.jsonl": b'{"body": "x"}\n'}, "no text to train on: .*no text in data.field='text'"),
        ({"a.txt.gz": b"\x1f\x8b damaged"}, "is no .gz file, or damaged"),
        ({"a.txt.gz": gzip.compress(b"x" * 9000)[:-9]}, "is no .gz file, or damaged"),
        ({"a.txt": b"line\n" * 900 + b"\xff\n" + b"line\n" * 900}, "is not UTF-8 at byte 4,500;"),
        ({"a.txt": b"\x1f\x8b\x08 packed" * 900}, "is packed by gzip; end its name in .gz"),
        ({"a.parquet": b"PAR1 damaged"}, "is no Parquet table, or damaged"),
        ({"a.arrow": b"ARROW1\0\0 of polars"}, "a.arrow is an Arrow file .Feather.; save it as"),
    ],
    ids=lambda value: str(list(value))[:30] if isinstance(value, dict) else "",
)
def test_a_text_that_cannot_be_read_is_an_error_of_one_line(files, message, small, tmp_path):
    if files.keys() & {"a.parquet", "a.arrow"}:
        pytest.importorskip("pyarrow", reason="Parquet needs it")
    (tmp_path / "text").mkdir()
    for name, data in files.items():
        (tmp_path / "text" / name).write_bytes(data)
    tokenizer = make_tokenizer("char", load_corpus("shakespeare"))
    with pytest.raises(InputError, match=message) as found:
        prepare(str(tmp_path / "text"), tmp_path / "out", tokenizer=tokenizer, processes=1)
    assert "\n" not in str(found.value)


def test_characters_that_the_tokenizer_lacks_name_the_unit(tmp_path):
    (tmp_path / "a.txt").write_text("ab€")
    tokenizer = make_tokenizer("char", load_corpus("shakespeare"))
    with pytest.raises(InputError, match=r"text holds '€', not among the 65 .*in train-00000 of"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=tokenizer, processes=1)


def test_a_folder_of_other_files_is_not_written_to(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    tokenizer = make_tokenizer("char", load_corpus("shakespeare"))
    with pytest.raises(InputError, match="out holds other files; name another folder"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=tokenizer, processes=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_program_names_its_own_flag(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "some text"}\n{"text": 3}\n')
    program = [sys.executable, "-m", "gt_jax.prepare", "--train_tokenizer=char", "--processes=1"]
    run = lambda name: subprocess.run(
        [*program, tmp_path / name, tmp_path / f"{name}.out"], capture_output=True, text=True
    )
    ended = run("a.jsonl")
    assert ended.returncode == 1
    assert "has no text in --field='text'; name one of its fields: body" in ended.stderr
    assert "b.jsonl at byte 22 has no text in --field='text' but a number;" in run("b.jsonl").stdout


def test_the_program_says_what_it_read_skipped_and_wrote(tmp_path):
    folder = write_folder(tmp_path / "text", bad=True)
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "gt_jax.prepare", *words], cwd=ROOT, capture_output=True, text=True
    )
    done = run(folder, tmp_path / "out", "--vocab_size=300", "--processes=1")
    assert done.returncode == 0, done.stderr
    for words in (
        "read     7 files of",
        "84 documents",
        "skipped  1 file: README.md is no text",
        "skipped  4 unreadable documents:",
        "skipped  1 empty document:",
        "uint16 ids of huggingface, vocabulary of 300",
    ):
        assert words in done.stdout
    shard = tmp_path / "out" / "train-00000.shard"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    checked = run("--check", tmp_path / "out")
    assert (checked.returncode, checked.stderr.count("\n")) == (1, 1)
    assert "train-00000.shard is damaged between bytes 0 and" in checked.stderr
