"""Tensors of a torch.save file, read and written without torch.

The file is a zip of data.pkl, which describes the tensors, and one file of raw numbers a storage.
A pickle is a program that can run any code. Python's own interpreter never sees it: the small one
in `gt_jax.convert.pickles` knows what describes tensors and makes nothing but those descriptions.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from gt_jax import archives
from gt_jax.convert import pickles
from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError, one_line

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
LARGEST_PICKLE = 1 << 23  # bytes; the largest models need some 200 kB
LARGEST_SHAPE = 1 << 48  # numbers, for shapes that a zero makes empty
MOST_READS = 8  # times the file's bytes that its tensors may read in all; tied ones need 2


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file by name, to be read from it one at a time.

    The file's size bounds time and memory, even for a malicious file.

    Raises:
        InputError: it is not a torch.save file, is damaged, or holds more than tensors by name.
    """
    try:
        archive = _Archive(Path(path))
        tensors = pickles.load(archive.program(), DTYPES, archive.tensor)
        return _checked(tensors)
    except Exception as error:  # A damaged zip file can raise anything.
        raise InputError(
            f"{path} is no torch.save file of tensors by name: {one_line(error)}"
        ) from error


def _checked(tensors) -> dict[str, Tensor]:
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; save the state_dict alone")
    return tensors


class _Archive:
    """The zip file: its pickle, and tensors in its storages."""

    def __init__(self, path: Path):
        self._path = path
        self._size = path.stat().st_size
        self._unread = MOST_READS * self._size  # bytes that tensors may still ask for
        self._whole = set()  # storages whose checksum was right
        self._entries = archives.entries(path)
        found = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(found) != 1:
            raise ValueError("it is another kind of zip file")
        self._root = found[0].split("/")[0]

    def program(self) -> bytes:
        """The pickle."""
        byteorder = f"{self._root}/byteorder"
        with zipfile.ZipFile(self._path) as archive:
            if byteorder in self._entries and archive.read(byteorder) != b"little":
                raise ValueError("it was written on a big-endian machine")
            size = self._entries[f"{self._root}/data.pkl"].file_size
            if size > LARGEST_PICKLE:
                raise ValueError(f"its pickle has {size:,} bytes, over {LARGEST_PICKLE:,}")
            return archive.read(f"{self._root}/data.pkl")

    def tensor(self, storage: pickles.Storage, offset, shape, strides) -> Tensor:
        """A tensor whose every number is known to lie in its storage; nothing is read yet."""
        dtype, name = DTYPES[storage.kind], f"{self._root}/data/{storage.key}"
        if name not in self._entries:
            raise ValueError(f"it has no {name}")
        stored = self._entries[name].file_size
        if stored != storage.size * dtype.itemsize:
            raise ValueError(f"{name} has {stored} bytes, not {storage.size} x {dtype.itemsize}")
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
            raise ValueError("a tensor's offset, shape and strides do not fit together")
        size = math.prod(shape)
        first_to_last = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if 0 in shape:
            first_to_last = offset = 0
        if (
            max(offset + first_to_last, size) > storage.size
            or math.prod(max(n, 1) for n in shape) > LARGEST_SHAPE
        ):
            raise ValueError(
                f"a tensor of shape {shape} needs more than its {storage.size} numbers"
            )
        self._unread -= max(first_to_last, size) * dtype.itemsize
        if self._unread < 0:
            raise ValueError(f"its tensors hold more than {MOST_READS} times the file's numbers")
        start, length = offset * dtype.itemsize, first_to_last * dtype.itemsize
        in_bytes = tuple(stride * dtype.itemsize for stride in strides)

        def read():
            try:
                data = self._bytes(name, start, length)
                return np.ndarray(shape, dtype, data, strides=in_bytes)  # checks its bounds
            except Exception as error:  # zipfile raises many kinds for one thing
                raise InputError(f"{self._path} is damaged ({one_line(error)})") from error

        return Tensor(tuple(shape), dtype, read)

    def _bytes(self, name, start, length) -> bytes:
        """Part of a storage, whose checksum is compared the first time."""
        entry = self._entries[name]
        if name not in self._whole:
            with zipfile.ZipFile(self._path) as archive, archive.open(name) as file:
                whole = b""
                if (start, length) == (0, entry.file_size):
                    whole = file.read()
                while file.read(1 << 20):  # to the end, where the checksum is compared
                    pass
            self._whole.add(name)
            if len(whole) == length:
                return whole
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
            lengths = struct.unpack("<HH", header[26:])  # of its name and what is called extra
            file.seek(entry.header_offset + 30 + sum(lengths) + start)
            data = file.read(length)
        if len(data) != length:
            raise ValueError(f"{name} ends early")
        return data


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as torch.save would; `torch.load(path, weights_only=True)` reads them."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    items = []
    with zipfile.ZipFile(path, "w") as archive:
        # A ZipInfo has no time of its own: same arrays, same bytes.
        add = lambda name, data: archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        for key, (name, array) in enumerate(arrays.items()):
            array = np.ascontiguousarray(array)
            strides = tuple(stride // array.itemsize for stride in array.strides)
            storage = _tuple(
                _plain("storage"),
                _global("torch", names[array.dtype]),
                *map(_plain, (str(key), "cpu", array.size)),
            )
            tensor = _call(
                _global("torch._utils", "_rebuild_tensor_v2"),
                storage + pickle.BINPERSID,
                *map(_plain, (0, array.shape, strides, False)),
                _call(_global("collections", "OrderedDict")),
            )
            items += [_plain(name), tensor]
            add(f"data/{key}", array.reshape(-1).view(np.uint8).data)
        content = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
        add("data.pkl", pickle.PROTO + b"\2" + content + pickle.STOP)
        add("byteorder", "little")
        add("version", "3\n")


# A pickle is a program for a stack machine; each of these programs leaves one value on the stack.


def _plain(value):
    return pickle.dumps(value, protocol=2)[2:-1]  # without its header and its stop


def _global(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*values):
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def _call(function, *arguments):
    return function + _tuple(*arguments) + pickle.REDUCE
