"""Token shards on disk: memory-mapped ids, the ends of documents, and checksums of both.

A prepared folder holds index.json, written last; tokenizer.gt_jax.json; and shards. A shard is

    ids           uint16 or uint32, little-endian, filled up with zeros to a multiple of 64 bytes
    ends          int64: the position after the last id of each document that ends in the shard
    checksums     uint32: CRC-32 of every 64 KiB of the above

so that `numpy.memmap(path, "<u2", shape=tokens)` reads it, and an altered byte is found when its
block is first used. A document may continue in the next shard.
"""

import functools
import hashlib
import json
import mmap
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.data.files import PREPARED_TOKENIZER as TOKENIZER
from gt_jax.data.files import small
from gt_jax.data.shard_index import SPLITS, check_index
from gt_jax.data.tokenizers import tokenizer_from_dict
from gt_jax.errors import InputError, one_line

FORMAT = "gt_jax token shards 1"
INDEX = "index.json"
_BLOCK = 1 << 16  # bytes under one checksum
_ALIGNED = 64  # bytes
_MOST_MAPPED = 128  # shards mapped at once; each costs a file descriptor


class ShardWriter:
    """Writes one shard in a constant amount of memory, besides 8 bytes a document."""

    def __init__(self, path: Path, dtype: str):
        """Args:
        path: file to make.
        dtype: "uint16" or "uint32".
        """
        self._path, self._dtype = path, np.dtype(dtype).newbyteorder("<")
        self._file = path.open("wb")
        self._buffer, self._sums, self._ends = bytearray(), array("I"), array("q")
        self._sha256 = hashlib.sha256()
        self._tokens, self._largest = 0, -1

    def add(self, ids: np.ndarray) -> None:
        """Append ids [n] to the document under way."""
        if len(ids):
            self._tokens += len(ids)
            self._largest = max(self._largest, int(ids.max()))
            self._write(ids.astype(self._dtype).tobytes())

    def end_document(self) -> None:
        """The document ends with the last id added."""
        self._ends.append(self._tokens)

    def close(self) -> dict[str, Any]:
        """Finish the file, on disk when this returns. Returns its record for the index."""
        self._write(bytes(-(self._tokens * self._dtype.itemsize) % _ALIGNED))
        self._write(np.array(self._ends, "<i8").tobytes())
        if self._buffer:
            self._write_block(bytes(self._buffer))
        self._put(np.array(self._sums, "<u4").tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        ended = self._ends[-1] if self._ends else 0
        return {
            "tokens": self._tokens,
            "ends": len(self._ends),
            "open": ended != self._tokens,
            "largest": self._largest,
            "sha256": self._sha256.hexdigest(),
        }

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write(self, data):
        self._buffer += data
        whole = len(self._buffer) // _BLOCK * _BLOCK
        for at in range(0, whole, _BLOCK):
            self._write_block(bytes(self._buffer[at : at + _BLOCK]))
        del self._buffer[:whole]

    def _write_block(self, block):
        self._sums.append(zlib.crc32(block))
        self._put(block)

    def _put(self, data):
        self._sha256.update(data)
        self._file.write(data)


class Shard:
    """One shard, mapped into memory while it is in use.

    Attributes:
        path: its file.
        tokens: how many ids it holds.
        ends: how many documents end in it.
        is_open: whether its last document continues in the next shard.
        sha256: of the file, as it was written.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], dtype: str):
        """Args:
            path: the file.
            record: what `ShardWriter.close` returned.
            dtype: "uint16" or "uint32".

        Raises:
            InputError: the file is missing or has another size than it was written with.
        """
        self.path, self._dtype = path, dtype
        self.tokens, self.ends, self.is_open = record["tokens"], record["ends"], record["open"]
        self.sha256 = record["sha256"]
        self._itemsize = np.dtype(dtype).itemsize
        data = self.tokens * self._itemsize
        self._ends_at = data + -data % _ALIGNED
        self._sums_at = self._ends_at + 8 * self.ends
        blocks = -(-self._sums_at // _BLOCK)
        self._unchecked, self._ends_checked = bytearray(b"\1") * blocks, False
        expected = self._sums_at + 4 * blocks
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        if size < expected:
            raise InputError(f"{path} is cut off at byte {size:,} of {expected:,}; {_AGAIN}")
        if size > expected:
            raise InputError(f"{path} has bytes behind its end, from byte {expected:,}; {_AGAIN}")

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids from position start up to stop, and the ends of documents [n] from start to stop - 1.

        Both are views that must be copied, not kept.

        Raises:
            InputError: their bytes are not those that were written.
        """
        self._check(start * self._itemsize, stop * self._itemsize)
        ids, ends, *_ = _views(self)
        if not self._ends_checked:
            ends = self._checked_ends()
        first = ends.searchsorted(start)
        if first == self.ends or ends[first] >= stop:
            return ids[start:stop], ends[:0]
        return ids[start:stop], ends[first : ends.searchsorted(stop)]

    def read_rows(
        self, starts: np.ndarray, tokens: np.ndarray, begins: np.ndarray, rows: Sequence[int]
    ) -> None:
        """Write ids to `rows` [n] of tokens [B, length], which begin at `starts` [n] and end here.

        begins [B, length] becomes 1 where a document of the shard begins.

        Raises:
            InputError: their bytes are not those that were written.
        """
        length, at = tokens.shape[1], starts.tolist()
        for start in at:
            self._check(start * self._itemsize, (start + length) * self._itemsize)
        ends, ids = self._checked_ends(), _views(self)[0]
        for row, start in zip(rows, at):
            tokens[row] = ids[start : start + length]
        firsts, lasts = ends.searchsorted((starts, starts + length)).tolist()
        for row, start, first, last in zip(rows, at, firsts, lasts):
            if last > first:
                begins[row, ends[first:last] - start] = 1

    def ends_until(self, position: int) -> int:
        """How many documents end at or before a position."""
        return int(self._checked_ends().searchsorted(position, "right"))

    def end(self, i: int) -> int:
        """The position after document number i of those that end in the shard."""
        return int(self._checked_ends()[i])

    def check(self) -> None:
        """Read everything once. Raises InputError at the first altered byte's block."""
        self._check(0, self._sums_at)

    def map(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, memoryview]:
        """(ids, ends, checksums, bytes), mapped anew."""
        with self.path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return (
            np.frombuffer(data, np.dtype(self._dtype).newbyteorder("<"), self.tokens),
            np.frombuffer(data, "<i8", self.ends, self._ends_at),
            np.frombuffer(data, "<u4", offset=self._sums_at),
            memoryview(data),
        )

    def _checked_ends(self):
        if not self._ends_checked:
            self._check(self._ends_at, self._sums_at)
            ends = _views(self)[1]
            last = int(ends[-1]) if len(ends) else 0
            if last > self.tokens or self.is_open == (last == self.tokens):
                raise InputError(
                    f"{self.path} holds {last:,} tokens of whole documents, which does not fit the "
                    f"{self.tokens:,} tokens that {INDEX} says; {_AGAIN}"
                )
            self._ends_checked = True
        return _views(self)[1]

    def _check(self, start, stop):
        """Compare the blocks of bytes start:stop with their checksums, each once."""
        block = self._unchecked.find(1, start // _BLOCK, -(-stop // _BLOCK))
        while block >= 0:
            *_, sums, data = _views(self)
            first, last = block * _BLOCK, min((block + 1) * _BLOCK, self._sums_at)
            if zlib.crc32(data[first:last]) != sums[block]:
                raise InputError(
                    f"{self.path} is damaged between bytes {first:,} and {last:,}: they are not "
                    f"those that were written; {_AGAIN}"
                )
            self._unchecked[block] = 0
            block = self._unchecked.find(1, block + 1, -(-stop // _BLOCK))


_AGAIN = "restore it, or delete the folder and prepare it again"


@functools.lru_cache(maxsize=_MOST_MAPPED)
def _views(shard: Shard):
    """What `Shard.map` returns, kept for the shards in use; unmapped when nothing refers to it."""
    return shard.map()


def release() -> None:
    """Unmap all shards: pages that were read no longer count as this process's memory."""
    _views.cache_clear()


class Prepared(NamedTuple):
    """A prepared folder: where, its shards by split, its tokenizer, and what index.json says."""

    folder: Path
    shards: dict[str, list[Shard]]
    tokenizer: Tokenizer
    index: dict[str, Any]


def is_prepared(source: str | Path) -> bool:
    """Whether a path is a folder that `gt_jax.prepare` made or is making."""
    try:
        folder = Path(source).expanduser()
        if not str(source):  # the working folder, to pathlib
            return False
        return (folder / INDEX).is_file() or (folder / UNFINISHED).is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


UNFINISHED = "unfinished"  # the folder of a preparation under way


def open_prepared(source: str | Path) -> Prepared:
    """A prepared folder; no token is read.

    Raises:
        InputError: preparation has not finished, a file is missing, cut off or of another
            preparation.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; name one that `python -m gt_jax.prepare` made")
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{folder} is not prepared to the end; run the same `python -m gt_jax.prepare` again"
        )
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise InputError(
            f"{folder / INDEX} is no index of {FORMAT!r}; name a folder that "
            "`python -m gt_jax.prepare` wrote"
        )
    try:
        text = small(folder / TOKENIZER).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / TOKENIZER} cannot be read ({error.strerror})") from error
    try:
        check_index(index)
        vocabulary = index["vocab_size"]
        if hashlib.sha256(text).hexdigest() != index["tokenizer_sha256"]:
            raise InputError(
                f"{folder / TOKENIZER} is not the tokenizer that these shards were made with; "
                f"{_AGAIN}"
            )
        tokenizer = tokenizer_from_dict(json.loads(text))
        shards = {
            split: [
                Shard(folder / record["file"], record, index["dtype"])
                for record in index["shards"]
                if record["split"] == split
            ]
            for split in SPLITS
        }
        largest = max((record["largest"] for record in index["shards"]), default=-1)
        fits = largest < vocabulary == tokenizer.vocab_size
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / INDEX} is damaged ({one_line(error)}); {_AGAIN}") from error
    if not fits:
        raise InputError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} ids and the shards ids up to "
            f"{largest} of {vocabulary}; {_AGAIN}"
        )
    return Prepared(folder, shards, tokenizer, index)


def check_folder(source: str | Path) -> int:
    """Compare every byte of a prepared folder with its checksums. Returns the number of shards.

    Raises:
        InputError: a shard is missing, cut off or altered; the message names the place.
    """
    shards = [shard for split in open_prepared(source).shards.values() for shard in split]
    for shard in shards:
        shard.check()
        release()
    return len(shards)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a prepared folder; {} for JSON of another kind.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = json.loads(small(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); {_AGAIN}") from error
    return content if isinstance(content, dict) else {}
