"""Tensors of a torch.save file, read and written without torch.

The file is a zip of data.pkl, which describes the tensors, and one file of raw numbers a storage.
Pickles can run code; this reader knows the few names that describe tensors and refuses all others.
"""

import collections
import functools
import math
import pickle
import zipfile

import ml_dtypes
import numpy as np

from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError

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
LARGEST_PICKLE = 1 << 26  # bytes; the largest models need some 200 kB


def read(path) -> dict[str, Tensor]:
    """The tensors of a torch.save file by name, to be read from it one at a time.

    Raises:
        InputError: not such a file, damaged, or more than tensors by name.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if len(pickles) != 1 or len(set(names)) != len(names) or packed:
            raise InputError(f"{path} is a zip file, but not one that torch.save wrote")
        root = pickles[0].split("/")[0]
        order = f"{root}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise InputError(f"{path} was written on a big-endian machine; save it on another")
        if archive.getinfo(pickles[0]).file_size > LARGEST_PICKLE:
            raise InputError(f"{path} has a data.pkl of over {LARGEST_PICKLE:,} bytes")
        with archive.open(pickles[0]) as file:
            content = _Unpickler(file, functools.partial(_Storage, archive, root)).load()
    except InputError as error:
        raise InputError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise InputError(f"{path} is damaged or no torch.save file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {str(name)[:80]!r} is no tensor; save the state_dict alone")
    return dict(content)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, make_storage):
        super().__init__(file, encoding="utf-8")
        self._make_storage = make_storage

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in KNOWN:
            raise InputError(f"refused: its pickle asks for {module}.{name}, which is no tensor")
        return KNOWN[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise InputError("refused: its pickle refers to something that is no tensor storage")
        return self._make_storage(key, dtype, size)


class _Storage:
    """`size` numbers in the archive's file data/KEY."""

    def __init__(self, archive, root, key, dtype, size):
        self._archive, self._name = archive, f"{root}/data/{key}"
        self.dtype, self.size = dtype, size
        stored = archive.getinfo(self._name).file_size
        if stored != size * dtype.itemsize:
            raise InputError(f"{self._name} has {stored} bytes, not {size} x {dtype.itemsize}")

    def read(self, offset, shape, strides):
        try:
            numbers = np.frombuffer(self._archive.read(self._name), self.dtype)[offset:]
        except Exception as error:  # zipfile raises many kinds for one thing
            raise InputError(f"{self._archive.filename} is damaged ({error})") from error
        in_bytes = [stride * self.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(numbers, shape, in_bytes, writeable=False)


def _rebuild_tensor(storage, offset, shape, strides, *_):
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise InputError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if 0 not in shape and max(last + 1, math.prod(shape)) > storage.size:
        raise InputError(f"a tensor of shape {shape} needs more than its {storage.size} numbers")
    read = functools.partial(storage.read, offset, shape, strides)
    return Tensor(tuple(shape), storage.dtype, read)


KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def write(path, arrays: dict[str, np.ndarray]) -> None:
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


# A pickle is a program for a stack machine; these are its pieces that leave one value on the stack.


def _plain(value):
    return pickle.dumps(value, protocol=2)[2:-1]  # without its header and its stop


def _global(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*pieces):
    return pickle.MARK + b"".join(pieces) + pickle.TUPLE


def _call(function, *arguments):
    return function + _tuple(*arguments) + pickle.REDUCE
