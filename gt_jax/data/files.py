"""Documents out of files: text, JSON lines and Parquet, packed or not; nothing read without end."""

import bz2
import codecs
import errno
import gzip
import hashlib
import json
import lzma
import os
import stat
from pathlib import Path
from typing import NamedTuple

from gt_jax.data.splits import named_splits
from gt_jax.errors import InputError, one_line

KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")  # that are looked for in a folder
JSON_LINES = (".jsonl", ".ndjson", ".json")  # .json if named itself: in a folder it may be anything
PREPARED_TOKENIZER = "tokenizer.gt_jax.json"  # in a folder that gt_jax.prepare made
PACKED_RATIO, PACKED_FLOOR = 100, 64 * 2**20  # a packed file may grow so far, or to so many bytes
_JSON_NAMES: dict[type, str] = dict.fromkeys((int, float), "a number")
_JSON_NAMES |= {bool: "true or false", list: "a list", dict: "an object"}
_TINY_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Texts(NamedTuple):
    """Documents to train on, those held out by name or None, and a note or None.

    test: the file to test on that its name leaves out, or the first of several.
    """

    train: list[str]
    validation: list[str] | None
    note: str | None
    test: Path | None = None


def read_path(source: str, field: str, *, unknown: str) -> Texts:
    """The documents of a file or folder.

    Args:
        source: a path, as `load_corpus` takes it.
        field: where the text is in a JSON object or a Parquet table.
        unknown: what to do where the path does not exist, to end a message with.

    Raises:
        InputError: nothing there, not a regular file, not text, damaged, longer than memory.
    """
    name = f"data.source={short(source)}"
    if not source.strip():
        raise InputError(f"{name} is empty{unknown}")
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{name} is no file, folder or built-in text{unknown}") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({reason}){unknown}") from error
    if stat.S_ISDIR(mode):
        return _read_folder(path, source, field)
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{name} is no regular file but a device, pipe or socket; save its text in a file"
        )
    documents, note = _read_file(path, field)
    return Texts(documents, None, note)


def small(path: Path, most: int = 1 << 28) -> Path:
    """`path` itself, if it is a file to read at once: a device or pipe might never end.

    Raises:
        OSError: it is not there, cannot be read, is no regular file, or has more bytes than `most`.
    """
    about = path.stat()
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if about.st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return path


def _read_folder(folder, source, field):
    files = sorted(f for f in folder.rglob("*") if kind_of(f)[0] in KINDS and f.is_file())
    if not files:
        if (folder / PREPARED_TOKENIZER).exists():
            raise InputError(
                f"data.source={short(source)} is a prepared folder, whose text is tokens already; "
                "only training reads it; name the text that it was made of"
            )
        if any(folder.rglob("*.arrow")):
            raise InputError(
                f"data.source={short(source)} holds .arrow files: turn them into a folder to train "
                f"from with `python -m gt_jax.prepare {source} DST`, or save them as .parquet"
            )
        raise InputError(
            f"data.source={short(source)} holds no .txt or .jsonl file, and no .parquet; add one"
        )
    read = lambda files: [document for file in files for document in _read_file(file, field)[0]]
    where = f"data.source={source!r}"
    splits = named_splits(where, {file: file.relative_to(folder) for file in files}, stem_of)
    if splits is None:
        return Texts(read(files), None, None)
    held_out = read(splits.validation) if splits.validation else None
    return Texts(read(splits.train), held_out, splits.note, next(iter(splits.test), None))


def kind_of(path: Path) -> tuple[str, str]:
    """(".txt" or another suffix, ".gz" or another packing or ""), in lower case."""
    name = path.name.lower()
    packing = next((suffix for suffix in UNPACK if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def stem_of(path: Path) -> str:
    """The name of a file without its kind and packing, in lower case."""
    return Path(path.name.lower().removesuffix(kind_of(path)[1])).stem


def _read_file(path, field):
    """(documents, note) of one regular file."""
    kind, packing = kind_of(path)
    where = f"data.source={short(str(path))}"
    if kind in ARCHIVES or packing in ARCHIVES:
        raise InputError(f"{where} is an archive; unpack it and name the folder")
    if kind == ".parquet" and not packing:
        return _read_parquet(path, where, field), None
    data = _read_bytes(path, where, packing)
    text = decode(data, where, packing)
    if kind in JSON_LINES:
        lines = enumerate(text.split("\n"), start=1)
        return [read_json(f"{where} line {n}", x, field) for n, x in lines if x.strip()], None
    if hashlib.sha256(data).hexdigest() == _TINY_SHAKESPEARE:
        return [text], "this is tiny Shakespeare: results compare with published numbers"
    return [text], None


def _read_bytes(path, where, packing):
    """The bytes of a file, unpacked: no more than memory holds, and no bomb."""
    try:
        with path.open("rb") as raw:
            limit = _memory()
            if packing:
                limit = min(limit, most_unpacked(os.fstat(raw.fileno()).st_size))
            data = bytearray()
            with UNPACK[packing](raw, where) if packing else raw as file:
                while part := file.read(2**20):
                    data += part
                    if len(data) > limit:
                        raise InputError(
                            f"{where} unpacks to more than {limit:,} bytes, over {PACKED_RATIO} "
                            "times its size; unpack it if that is right"
                            if limit < _memory()
                            else f"{where} is larger than this machine's memory; name a shorter "
                            "text"
                        )
            return bytes(data)
    except MemoryError as error:
        raise InputError(f"{where} does not fit into memory; name a shorter text") from error
    except Exception as error:
        raise unreadable(error, where, packing) from error


def unreadable(error: Exception, where: str, packing: str) -> Exception:
    """What to raise when reading a file failed with an error; `packing` as of `kind_of`."""
    if isinstance(error, InputError):
        return error
    # Every library of a packing has errors of its own.
    if packing and getattr(error, "errno", None) is None:
        reason = " ".join(str(error).split())
        return InputError(f"{where} is no {packing} file, or damaged ({reason}); pack it again")
    if not isinstance(error, OSError):
        return error
    return InputError(f"{where} cannot be read ({error.strerror}); change its permissions")


def most_unpacked(packed: int) -> int:
    """Bytes that a packed file of so many bytes may unpack to; more is taken for a bomb."""
    return max(PACKED_FLOOR, PACKED_RATIO * packed)


def _memory():
    """Bytes of memory of this machine; endless where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _zstd(raw, where):
    """A reader of Zstandard data: the standard library's from Python 3.14, else a package's."""
    try:
        # Python has this module from 3.14 on.
        from compression import zstd  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            import zstandard  # pyright: ignore[reportMissingImports]  an optional package
        except ImportError as error:
            raise InputError(
                f"{where} needs `pip install zstandard`; or unpack it with `unzstd`"
            ) from error
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return zstd.ZstdFile(raw)


UNPACK = {
    ".gz": lambda raw, where: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw, where: bz2.BZ2File(raw),
    ".xz": lambda raw, where: lzma.LZMAFile(raw),  # noqa: SIM115  the caller closes it
    ".zst": _zstd,
}
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_MAGIC = {  # how data begins that is no text -> what it is, and what to do
    b"\x1f\x8b": "is packed by gzip; end its name in .gz",
    b"\x28\xb5\x2f\xfd": "is packed by zstd; end its name in .zst",
    b"BZh": "is packed by bzip2; end its name in .bz2",
    b"\xfd7zXZ": "is packed by xz; end its name in .xz",
    b"PAR1": "is a Parquet table; end its name in .parquet",
    b"ARROW1\0\0": "is an Arrow file (Feather); save it as .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it and name the folder",
    b"7z\xbc\xaf": "is an archive; unpack it and name the folder",
    codecs.BOM_UTF16_LE: "is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}


def decode(data: bytes, where: str, packing: str = "") -> str:
    """The text of bytes of UTF-8, without a byte order mark.

    Args:
        data: unpacked, if they were packed.
        where: begins every message.
        packing: ".gz" or another suffix of what they were unpacked from, or "".

    Raises:
        InputError: they are something else.
    """
    refuse_other_kinds(data, where, packing)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 at byte {error.start}; convert it, e.g. with `iconv -t UTF-8`"
        ) from error


def refuse_other_kinds(data: bytes, where: str, packing: str = "") -> None:
    """Raise InputError if a file that begins with these bytes is packed, an archive or UTF-16."""
    for start, what in _MAGIC.items():
        if data.startswith(start) and not (start.isascii() and _is_text(data)):
            if packing:
                what = f"unpacks to what {what.partition(';')[0]}; unpack it first"
            raise InputError(f"{where} {what}")


def _is_text(data):
    try:
        return b"\0" not in data and bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def read_json(where: str, line: str | bytes, field: str) -> str:
    """The text of one line of JSONL.

    Raises:
        InputError: there is none; `where` begins the message.
    """
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply to be read; remove it") from error
    except ValueError as error:  # a syntax error, or a number of too many digits
        reason = str(error).partition(";")[0]
        raise InputError(f"{where} is not JSON ({reason}); fix or remove it") from error
    return text_field(where, row, field)


def text_field(where: str, row: object, field: str) -> str:
    """row[field] as a string.

    Raises:
        InputError: it is not there, no text, or holds half of a surrogate pair; `where` begins it.
    """
    if not isinstance(row, dict):
        kind = _JSON_NAMES.get(type(row), "text" if isinstance(row, str) else "null")
        raise InputError(
            f"{where} is {kind}, not an object with a data.field={field!r}; write an object a line"
        )
    value = row.get(field)
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        said = f"{where} has no text in data.field={field!r}"
        if value is not None:
            kind = _JSON_NAMES.get(type(value), type(value).__name__)
            raise InputError(f"{said} but {kind}; make it a string, or name another field")
        names = [one_line(name[:40]) for name in row]
        has = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise InputError(f"{said}; name one of its fields: {has or 'none'}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds {value[error.start]!a}, half of a surrogate pair; fix or remove it"
        ) from error
    return value


def _read_parquet(path, where, field):
    """The texts in a column of a Parquet table."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{where} needs `pip install pyarrow`; or convert it to .jsonl") from error
    documents, characters = [], 0
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                text_field(where, dict.fromkeys(names), field)
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row = f"{where} row {len(documents) + 1}"
                    documents.append(text_field(row, {field: value}, field))
                    characters += len(documents[-1])
                if characters > _memory():
                    raise InputError(f"{where} does not fit into memory; name a shorter text")
    except InputError:
        raise
    except Exception as error:  # damaged files fail in every way there is
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{where} is no Parquet table, or damaged ({reason})") from error
    return documents


def short(text: str) -> str:
    """repr of a path, of a name too long its end."""
    return repr(text if len(text) <= 300 else f"...{text[-200:]}")
