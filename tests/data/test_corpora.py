"""Files and folders of text, packed or not: what is read, and what is refused."""

import ast
import bz2
import functools
import gzip
import hashlib
import json
import lzma
import os
import socket
import sys
from pathlib import Path

import pytest

from gt_jax.data import corpora, files, load_corpus
from gt_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")

pack = functools.partial(gzip.compress, mtime=0)  # the same bytes at any time


def whole(corpus):
    return "".join(corpus.train + corpus.validation)


def test_a_file_is_one_document_split_by_characters(write):
    text = "0123456789é" * 100
    corpus = load_corpus(write("a.txt", "\ufeff" + text), validation_fraction=0.25)
    assert corpus.train == (text[:825],)
    assert corpus.validation == (text[825:],)
    assert corpus.note is None


def test_a_folder_is_split_by_documents_in_order_of_path(write, tmp_path):
    for name in ("b/2.txt", "a.txt", "b/10.txt", "b/ignored.md", "empty.txt"):
        write(f"books/{name}", "" if name == "empty.txt" else name)
    write("books/c.jsonl", '{"text": "first"}\n\n{"text": "second"}\n')
    corpus = load_corpus(str(tmp_path / "books"), validation_fraction=0.2)
    assert corpus.train == ("a.txt", "b/10.txt", "b/2.txt", "first")
    assert corpus.validation == ("second",)


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "c4-train.00000-of-01024.json.gz"])
def test_other_names_of_json_lines_are_read_as_they_are(name, tmp_path):
    """As polars writes them, and as C4 does; a .json beside others is a list of something else."""
    lines = b'{"text": "first"}\n{"text": "second"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert files.read_path(str(path), "text", unknown="").train == ["first", "second"]
    (tmp_path / "b.txt").write_text("third")
    beside = files.read_path(str(tmp_path), "text", unknown="").train
    assert beside == (["first", "second", "third"] if name == "a.ndjson" else ["third"])


def test_jsonl_is_a_document_a_line(write):
    rows = [{"body": f"document {i}\u2028\n"} for i in range(10)]
    path = write("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    corpus = load_corpus(path, field="body")
    assert corpus.train + corpus.validation == tuple(row["body"] for row in rows)
    assert len(corpus.validation) == 1


def test_tiny_shakespeare_is_recognised(write, monkeypatch):
    path = write("tiny.txt", "stands for the real file")
    assert load_corpus(path).note is None
    digest = hashlib.sha256(b"stands for the real file").hexdigest()
    monkeypatch.setattr(files, "_TINY_SHAKESPEARE", digest)
    assert "compare with published numbers" in load_corpus(path).note


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("latin.txt", b"caf\xe9", r"latin.txt' is not UTF-8 at byte 3; convert it"),
        ("empty.txt", " \n", r"empty.txt' holds no text"),
        ("one.txt", "x", r"one.txt' is one character long"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b", "n": 1}',
            r"line 2 .*'text'; name one of its fields: body",
        ),
        ("b.jsonl", '{"text": "a"}\n{"text":', r"line 2 is not JSON"),
        ("b.json", '[{"text": "a"}]', r"line 1 is a list, not an object with a data.field='text'"),
        ("b.json", '{\n "text": "a"\n}', r"line 1 is not JSON"),
        ("c.jsonl", '"a"\n', r"line 1 is text, not an object with .*; write an object a line"),
        ("c.jsonl", "null\n", r"line 1 is null, not an object"),
        ("c.jsonl", '{"text": 3}', r"no text in data.field='text' but a number; make it a string"),
        ("c.jsonl", '{"text": ["a"]}', r"no text in data.field='text' but a list; make it a"),
        ("c.jsonl", '{"text": {"a": 1}}', r"no text in data.field='text' but an object; make"),
        ("c.jsonl", '{"text": true}', r"no text in data.field='text' but true or false; make"),
        ("c.jsonl", '{"text": null}', r"no text in data.field='text'; name one of its fields: te"),
        ("c.arrow", b"ARROW1\0\0\xff", r"c.arrow' is an Arrow file \(Feather\); save it as"),
        ("d.jsonl", "[1]", r"line 1 is a list, not an object with a data.field"),
        ("e.jsonl", '{"text": ' + "9" * 5000 + "}", r"line 1 is not JSON \(Exceeds the limit"),
        ("f.jsonl", '{"text": "a"}\n' + "[" * 100_000, r"line 2 is nested too deeply"),
        ("g.jsonl", '{"a":' * 100_000, r"line 1 is nested too deeply"),
        ("h.jsonl", '{"text": "\\ud83d"}', r"line 1 holds '\\ud83d', half of a surrogate pair"),
        ("i.jsonl", b'{"text": "\xff"}', r"i.jsonl' is not UTF-8 at byte 10"),
        ("j.jsonl", json.dumps({"x" * 10**6: 1, "b": 2}), r"its fields: x{40}, b"),
        ("utf16.txt", "abc".encode("utf-16"), r"utf16.txt' is UTF-16; convert it"),
        ("a.txt", pack(b"abc"), r"a.txt' is packed by gzip; end its name in .gz"),
        ("a.json", b"PK\x03\x04\xff", r"a.json' is a zip archive; unpack it"),
        ("b.txt", b"PAR1\xff", r"b.txt' is a Parquet table; end its name in .parquet"),
        ("a.zip", b"PK", r"a.zip' is an archive; unpack it"),
        ("a.tar.gz", b"", r"a.tar.gz' is an archive; unpack it"),
        ("b.txt.gz", b"abc", r"b.txt.gz' is no .gz file, or damaged"),
        ("c.txt.gz", pack(b"abc" * 99)[:-9], r"c.txt.gz' is no .gz file, or damaged"),
        ("d.txt.xz", b"abc", r"d.txt.xz' is no .xz file, or damaged"),
        ("e.txt.bz2", b"abc", r"e.txt.bz2' is no .bz2 file, or damaged"),
        ("f.txt.gz", pack(b"\xff"), r"f.txt.gz' is not UTF-8 at byte 0"),
        ("g.txt.gz", b"", r"g.txt.gz' holds no text"),
    ],
)
def test_a_bad_file_is_refused(write, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_corpus(write(name, content))
    assert str(error.value).startswith("data.source=") and "\n" not in str(error.value)


def test_an_unreadable_file_is_refused(write, monkeypatch):
    path = write("a.txt", "text")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "open", refuse)
    with pytest.raises(InputError, match=r"a.txt' cannot be read \(Permission denied\)"):
        load_corpus(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no .txt or .jsonl file, and no .parquet; add one"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source='' is empty; name one, or shakespeare"),
        (" ", "data.source=' ' is empty"),
        ("/dev/zero", "no regular file but a device, pipe or socket"),
        ("/dev/null", "no regular file but a device, pipe or socket"),
        ("a\0b", "cannot be read (embedded null byte)"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("~no such user/a.txt", "data.source='~no such user/a.txt'"),
    ],
)
def test_a_source_without_text_or_without_end_is_refused(source, message):
    with pytest.raises(InputError) as error:
        load_corpus(source)
    assert message in str(error.value) and len(str(error.value)) < 500


def test_pipes_and_sockets_are_refused_at_once(tmp_path):
    pipe, listener = tmp_path / "pipe.txt", tmp_path / "socket.txt"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listener))
        for path in (pipe, listener):
            with pytest.raises(InputError, match="no regular file but a device, pipe or socket"):
                load_corpus(str(path))
        (tmp_path / "a.txt").write_text("in a folder they are passed over")
        assert whole(load_corpus(str(tmp_path))) == "in a folder they are passed over"


PACK = {".gz": pack, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACK)
def test_packed_text_is_read_as_unpacked(write, tmp_path, packing):
    text = "It is read as it was. é\n" * 20
    plain = load_corpus(write("a.txt", text))
    packed = load_corpus(write(f"a.txt{packing}", PACK[packing](text.encode())))
    assert packed._replace(name=plain.name) == plain
    lines = b'{"text": "first"}\n{"text": "second"}\n'
    write(f"folder/b.jsonl{packing}", PACK[packing](lines))
    write("folder/a.txt", "zeroth")
    assert load_corpus(str(tmp_path / "folder")).train == ("zeroth", "first")


def test_zstd_is_read_where_a_library_is_there_and_named_where_not(write, monkeypatch):
    path = write("a.txt.zst", b"\x28\xb5\x2f\xfd\x04\x00\x19\x00\x00abc")
    for name in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"a.txt.zst' needs `pip install zstandard`; or unpack"):
        load_corpus(path)
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard", reason="reading .zst needs it")
    text = "It is read as it was. é\n" * 20
    packed = write("b.txt.zst", zstandard.compress(text.encode()))
    assert whole(load_corpus(packed)) == text


def test_a_packed_bomb_is_refused_before_it_fills_memory(write, monkeypatch):
    monkeypatch.setattr(files, "PACKED_FLOOR", 2**22)
    bomb = pack(b"a" * 2**25)
    with pytest.raises(InputError, match=r"unpacks to more than 4,194,304 bytes, over 100 times"):
        load_corpus(write("bomb.txt.gz", bomb))
    assert len(whole(load_corpus(write("a.txt.gz", pack(b"a" * 2**21))))) == 2**21


def test_a_file_larger_than_memory_is_refused(write, monkeypatch):
    monkeypatch.setattr(files, "_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"larger than this machine's memory"):
        load_corpus(write("a.txt", "a" * 1001))
    assert len(whole(load_corpus(write("b.txt", "a" * 1000)))) == 1000


def test_parquet_is_a_document_a_row(write, monkeypatch):
    path = write("a.parquet", b"PAR1 and so on")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(InputError, match=r"needs `pip install pyarrow`; or convert it"):
            load_corpus(path)
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs it")
    from pyarrow import parquet

    with pytest.raises(InputError, match=r"a.parquet' is no Parquet table, or damaged"):
        load_corpus(path)
    rows = [f"document {i} é" for i in range(1000)]
    parquet.write_table(pyarrow.table({"body": rows, "n": list(range(1000))}), path)
    corpus = load_corpus(path, field="body")
    assert corpus.train + corpus.validation == tuple(rows)
    for field, fix in (("text", "; name .*: body, n$"), ("n", " but a number; make it a string")):
        with pytest.raises(InputError, match=rf"no text in data.field='{field}'{fix}"):
            load_corpus(path, field=field)


def test_a_folder_of_arrow_files_names_the_program_that_reads_it(tmp_path):
    """`save_to_disk` of Hugging Face's datasets wrote it."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match=r"holds .arrow files: .*python -m gt_jax.prepare .* DST`"):
        load_corpus(str(tmp_path))


def test_names_of_fields_in_messages_are_one_line_that_prints(write):
    path = write("a.jsonl", json.dumps({"a\nb\x1b[31m\ud83d": "x"}))
    with pytest.raises(InputError, match=r"name one of its fields: a b\\x1b\[31m\\ud83d$"):
        load_corpus(path)


def test_an_unknown_source_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"did you mean 'shakespeare'\?"):
        load_corpus("shakespear")
    with pytest.raises(InputError, match=r"data.source='books/x.txt' is no file, folder"):
        load_corpus("books/x.txt")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(InputError, match=rf"data.validation_fraction={fraction} must lie"):
        load_corpus("shakespeare", validation_fraction=fraction)


def test_data_imports_neither_jax_nor_the_models():
    for path in Path(corpora.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            ours = ("gt_jax.data", "gt_jax.errors")
            assert not [n for n in names if "jax" in n and not n.startswith(ours)], path
