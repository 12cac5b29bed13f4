"""Zip archives from untrusted sources: only plain files are read, and no more than the zip holds.

A zip can claim files far larger than itself, millions of them, or the same bytes many times over.
The archives read here are uncompressed, so a file can be compared with the room that it takes.
"""

import contextlib
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

LARGEST_DIRECTORY = 1 << 23  # bytes of the list of files, some 80 each


def entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip archive by name.

    Raises:
        ValueError: the archive holds compressed files, two files of one name, or more bytes than
            it has itself, or its list of files is too long.
        zipfile.BadZipFile, OSError: it is damaged, no zip file, or cannot be read.
    """
    size = path.stat().st_size
    if not path.is_file():  # a device would never end
        raise ValueError("it is no file")
    with path.open("rb") as file:
        _check_directory(file, size)
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
    by_name = {entry.filename: entry for entry in found}
    plain = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        for entry in found
    )
    if not plain or len(by_name) != len(found):
        raise ValueError("it is another kind of zip file")
    if sum(entry.file_size for entry in found) > size:
        raise ValueError("its parts are larger than the file")
    return by_name


def _check_directory(file, size):
    """Refuse a zip that lists far more files than any of ours: zipfile would read all at once."""
    file.seek(max(size - (1 << 16) - 22 - 20, 0))
    tail = file.read()
    claims = []
    end = tail.rfind(b"PK\5\6")
    with contextlib.suppress(struct.error):
        claims += struct.unpack_from("<L", tail, end + 12) if end >= 0 else ()
        if end >= 20 and tail[end - 20 : end - 16] == b"PK\6\7":  # where 64-bit numbers stand
            file.seek(struct.unpack_from("<Q", tail, end - 20 + 8)[0])
            claims += struct.unpack_from("<Q", file.read(56), 40)
    claims = [claim for claim in claims if claim != 0xFFFFFFFF]
    if max(claims, default=0) > LARGEST_DIRECTORY:
        raise ValueError(f"its list of files has {max(claims):,} bytes")


class StoredArray(NamedTuple):
    """An array in an .npz file: its shape and dtype; the numbers are still in the file."""

    path: Path
    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The array. Raises ValueError or zipfile.BadZipFile if it is damaged."""
        with zipfile.ZipFile(self.path) as archive, archive.open(self.entry) as file:
            return npy.read_array(file, allow_pickle=False)


def arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of an .npz file that np.savez wrote, by name; each is as large as it claims.

    Raises:
        ValueError, zipfile.BadZipFile, OSError: it is damaged, or no .npz file.
    """
    found, files = {}, entries(path)
    with zipfile.ZipFile(path) as archive:
        for name, entry in files.items():
            if not name.endswith(".npy"):
                raise ValueError(f"it holds {name[:80]!r}, which is no array")
            with archive.open(entry) as file:
                version = npy.read_magic(file)
                headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                if version not in headers:
                    raise ValueError(f"it holds an array in version {version} of NumPy's format")
                shape, _, dtype = headers[version](file)
                room = entry.file_size - file.tell()
            size = dtype.itemsize
            for length in shape:
                size *= length
            if dtype.hasobject or min(shape, default=0) < 0 or size != room:
                raise ValueError(f"{name} {list(shape)[:9]} does not fit its {room} bytes")
            found[name.removesuffix(".npy")] = StoredArray(path, entry, shape, dtype)
    return found
