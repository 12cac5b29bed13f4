"""Documents out of a part of a file of any size, in blocks that fit into memory."""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from gt_jax.data.corpora import SHAKESPEARE, load_shakespeare
from gt_jax.data.files import (
    JSON_LINES,
    UNPACK,
    decode,
    kind_of,
    most_unpacked,
    read_json,
    refuse_other_kinds,
    text_field,
    unreadable,
)
from gt_jax.data.sources import Range
from gt_jax.data.tables import arrow_rows, parquet_rows
from gt_jax.errors import InputError

BLOCK = 1 << 20  # bytes or characters of a document that are encoded at once
LONGEST_LINE = 1 << 28  # bytes of one JSON object


class Document(NamedTuple):
    """A document, or a part of one: its text in blocks, and whether its start and end are here."""

    blocks: Iterable[str]
    begins: bool = True
    ends: bool = True


class Skipped(NamedTuple):
    """A document left out: "empty" or "unreadable", and a line that says where and why."""

    reason: str
    message: str


def documents(
    source: str, part: Range, field: str, count: Callable[[int], None]
) -> Iterator[Document | Skipped]:
    """What a range of a source holds, as `gt_jax.data.sources.plan` cut it.

    Args:
        source: as `plan` took it.
        part: one of its ranges.
        field: where text is in JSON objects and tables.
        count: called with the number of bytes of the file read since its last call.

    Raises:
        InputError: a file is damaged or cannot be read; the message names it.
    """
    if source in SHAKESPEARE:
        yield from (_document(source, text) for text in load_shakespeare(source)[0])
        return
    path = Path(source).expanduser() / part.path
    kind, packing = kind_of(path)
    if kind in (".parquet", ".arrow") and not packing:
        if kind == ".parquet":
            rows = parquet_rows(path, part.start, part.stop, field, count)
        else:
            rows = arrow_rows(path, field, count)
        for row, value in rows:
            yield _row_document(f"{path} row {row}", {field: value}, field)
        return
    try:
        with path.open("rb", buffering=0) as raw:
            if kind in JSON_LINES:
                yield from _json_lines(raw, path, part, packing, field, count)
            else:
                yield _text(raw, path, part, packing, count)
    except Exception as error:
        raise unreadable(error, str(path), packing) from error


def _text(raw, path, part, packing, count) -> Document | Skipped:
    """The document, or the part of it, in a range of a text file.

    One block that is all of a file is read at once: it may turn out to be empty, or no text.
    """
    size = None
    if not packing:
        start = _cut(raw, part.start)
        size = None if part.last else _cut(raw, part.stop) - start
        raw.seek(start)
    blocks = _byte_blocks(_open(raw, path, packing, count), size)
    first = next(blocks, b"")
    second = next(blocks, None)
    begins = part.start == 0
    if begins and part.last and second is None:
        try:
            return _document(str(path), decode(first, str(path)))
        except InputError as error:
            return Skipped("unreadable", str(error))
    if begins:
        refuse_other_kinds(first[:64], str(path))
    read = [first] if second is None else [first, second]
    text = _decoded(path, part.start, itertools.chain(read, blocks), packing)
    return Document(text, begins=begins, ends=part.last)


def _decoded(path, at: int, blocks: Iterable[bytes], packing: str) -> Iterator[str]:
    """Text of blocks of bytes, of which the first lies at byte `at`."""
    try:
        for block in blocks:
            text = block.decode("utf-8")
            yield text.removeprefix("\ufeff") if at == 0 else text
            at += len(block)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 at byte {at + error.start:,}; convert it, e.g. with "
            "`iconv -t UTF-8`"
        ) from error
    except Exception as error:
        raise unreadable(error, str(path), packing) from error


def _byte_blocks(file, size: int | None) -> Iterator[bytes]:
    """The next `size` bytes, or all, in blocks that end with a line or else with a character."""
    rest = b""
    while True:
        part = file.read(BLOCK if size is None else min(BLOCK, size))
        rest += part
        if len(part) < BLOCK:
            break
        size = size if size is None else size - len(part)
        cut = rest.rfind(b"\n") + 1 or _whole_characters(rest)
        if cut:
            yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _whole_characters(data: bytes) -> int:
    """The length of data without a UTF-8 character cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        first = data[-back]
        if first & 0xC0 != 0x80:  # begins a character of so many bytes
            length = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
            return len(data) - back if length > back else len(data)
    return len(data)


def _cut(raw, at: int) -> int:
    """Where a text can be cut: the next line from `at` on, or else the character there.

    The range before and the range after a cut find the same place, and neither is empty.
    """
    if at == 0:
        return 0
    raw.seek(at - 1)
    line = at + raw.read(BLOCK).find(b"\n")
    if at <= line < os.fstat(raw.fileno()).st_size:
        return line
    raw.seek(max(at - 3, 0))
    before = raw.read(min(at, 3) + 1)
    return at - next((n for n, byte in enumerate(reversed(before)) if byte & 0xC0 != 0x80), 0)


def _json_lines(raw, path, part, packing, field, count) -> Iterator[Document | Skipped]:
    """The documents of the lines that begin in a range."""
    start = 0 if packing else part.start
    raw.seek(max(start - 1, 0))
    file = _open(raw, path, packing, count)
    at = start
    if start:  # A line that begins before belongs to the range before.
        at += len(_line(file, path, at)) - 1
    while packing or at < part.stop:
        line = _line(file, path, at)
        if not line:
            return
        if at == 0:
            refuse_other_kinds(line[:64], str(path))
        where = f"{path} at byte {at:,}"
        at += len(line)
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
            yield _document(where, read_json(where, text, field))
        except UnicodeDecodeError:
            yield Skipped("unreadable", f"{where} is not UTF-8")
        except InputError as error:
            yield Skipped("unreadable", str(error))


def _line(file, path, at: int) -> bytes:
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise InputError(
            f"{path} has a line of more than {LONGEST_LINE:,} bytes at byte {at:,}; cut it"
        )
    return line


def _row_document(where: str, row: dict[str, Any], field: str) -> Document | Skipped:
    try:
        return _document(where, text_field(where, row, field))
    except InputError as error:
        return Skipped("unreadable", str(error))


def _document(where: str, text: str) -> Document | Skipped:
    return Document(_cut_text(text)) if text.strip() else Skipped("empty", f"{where} is empty")


def _cut_text(text: str) -> Iterator[str]:
    """A text in blocks that end with a line where there is one."""
    start = 0
    while start < len(text):
        end = min(start + BLOCK, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


class _Watched(io.RawIOBase):
    """A file that calls `watch` with the number of bytes of every read."""

    def __init__(self, file: IO[bytes], watch: Callable[[int], None]):
        self._file, self._watch = file, watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._watch(len(data))
        return len(data)


def _open(raw, path, packing, count) -> IO[bytes]:
    """A buffered reader of a file from where it stands, unpacked."""
    packed = io.BufferedReader(_Watched(raw, count), BLOCK)
    if not packing:
        return packed
    limit, total = most_unpacked(path.stat().st_size), 0

    def watch(size):
        nonlocal total
        total += size
        if total > limit:
            raise InputError(
                f"{path} unpacks to more than {limit:,} bytes; unpack it if that is right"
            )

    return io.BufferedReader(_Watched(UNPACK[packing](packed, str(path)), watch), BLOCK)
