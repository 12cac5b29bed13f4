"""Tensors of a torch.save file, read and written without torch.

The file is a zip of data.pkl, which describes the tensors, and one file of raw numbers a storage.
A pickle can run any code. This reader knows what describes tensors and refuses all else unrun.
"""

import collections
import functools
import io
import math
import pickle
import pickletools
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
LARGEST_PICKLE = 1 << 23  # bytes; the largest models need some 200 kB
# What tensors by name need. Some others can ask for any amount of memory.
NEEDED = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT
    SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID
    REDUCE BUILD
"""
OPCODES = frozenset(NEEDED.split())


def read(path) -> dict[str, Tensor]:
    """The tensors of a torch.save file by name, to be read from it one at a time.

    Raises:
        InputError: not such a file, damaged, or more than tensors by name.
    """
    try:
        return _read(zipfile.ZipFile(path))
    except Exception as error:  # A damaged zip file or pickle can raise anything.
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no torch.save file of tensors by name: {reason}") from error


def _read(archive):
    names = archive.namelist()
    pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    if len(pickles) != 1 or len(set(names)) != len(names) or packed:
        raise ValueError("it is another kind of zip file")
    root = pickles[0].split("/")[0]
    if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    program = archive.read(pickles[0])
    _check_opcodes(program)
    tensors = _Unpickler(io.BytesIO(program), functools.partial(_Storage, archive, root)).load()
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"it holds a {type(name).__name__} for a name")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; save the state_dict alone")
    return dict(tensors)


def _check_opcodes(program: bytes):
    if len(program) > LARGEST_PICKLE:
        raise ValueError(f"its pickle has {len(program):,} bytes, over {LARGEST_PICKLE:,}")
    for opcode, argument, _ in pickletools.genops(program):
        too_far = opcode.name == "LONG_BINPUT" and argument > len(program)
        if opcode.name not in OPCODES or too_far:
            raise ValueError(f"its pickle holds {opcode.name}, which tensors do not need")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, make_storage):
        super().__init__(file)
        self._make_storage = make_storage

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return name  # not the dtype: a pickle can change an object
        if (module, name) not in KNOWN:
            raise ValueError(f"its pickle asks for {module}.{name}, which tensors do not need")
        return KNOWN[module, name]

    def persistent_load(self, pid):
        kind, storage, key, _, size = pid
        if (kind, type(storage), type(key), type(size)) != ("storage", str, str, int):
            raise ValueError("its pickle refers to something that is no tensor storage")
        return self._make_storage(key, DTYPES[storage], size)


class _Storage:
    """`size` numbers in the archive's file data/KEY."""

    def __init__(self, archive, root, key, dtype, size):
        self._archive, self._name = archive, f"{root}/data/{key}"
        self.dtype, self.size = dtype, size
        stored = archive.getinfo(self._name).file_size
        if stored != size * dtype.itemsize:
            raise ValueError(f"{self._name} has {stored} bytes, not {size} x {dtype.itemsize}")

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
        raise ValueError("a tensor's offset, shape and strides do not fit together")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if 0 not in shape and max(last + 1, math.prod(shape)) > storage.size:
        raise ValueError(f"a tensor of shape {shape} needs more than its {storage.size} numbers")
    return Tensor(shape, storage.dtype, functools.partial(storage.read, offset, shape, strides))


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
