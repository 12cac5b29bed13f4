"""Pickles that are more than tensors by name: refused in one line, nothing run."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from gt_jax.convert import pth
from tests.convert import small


def zip_of(path, content, extra=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in extra:
            archive.writestr(name, data)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, r"posix\.mkdir"), (eval, r"builtins\.eval"), (io.open, r"_?io\.open")],
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, function, name):
    argument = str(tmp_path / "run") if function is not eval else "1/0"
    zip_of(tmp_path / "a.pth", pickle.dumps({"emb.weight": Call(function, argument)}))
    small.refuse(
        tmp_path / "a.pth",
        tmp_path / "new",
        rf"its pickle asks for {name}.*, which tensors do not need",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "it holds a list"),
        (pickle.dumps({"epoch": 3}), "epoch is a int; save the state_dict alone"),
        (pickle.dumps({3: 3}), "it holds a int for a name"),
        (pickle.dumps({"a": 1})[:-1], "is no torch.save file of tensors by name: "),
        (b"\x80\x02" + b"(" * 100_000, "is no torch.save file of tensors by name: "),
        (b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40), "is no torch.save file"),
        (pickle.dumps({"a": bytearray(3)}, 5), "its pickle holds BYTEARRAY8, which tensors do not"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "its pickle holds LONG_BINPUT"),  # a memo of 2^31 places
        (pickle.dumps({"a": "b" * pth.LARGEST_PICKLE}, 2), "its pickle has 8,388,6.. bytes, over"),
        (b"not a pickle", "is no torch.save file of tensors by name: "),
        (b"", "is no torch.save file of tensors by name: "),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, message):
    zip_of(tmp_path / "a.pth", content)
    small.refuse(tmp_path / "a.pth", tmp_path / "new", message)


def tensor_pickle(offset, shape, strides, *, size=4, key="0"):
    """The pickle of {"a": one tensor} as pth.write makes it, with any numbers."""
    storage = pth._tuple(
        pth._plain("storage"),
        pth._global("torch", "FloatStorage"),
        *map(pth._plain, (key, "cpu", size)),
    )
    tensor = pth._call(
        pth._global("torch._utils", "_rebuild_tensor_v2"),
        storage + pickle.BINPERSID,
        *map(pth._plain, (offset, shape, strides, False, None)),
    )
    return b"\x80\x02}(" + pth._plain("a") + tensor + b"u."


FIT = "a tensor's offset, shape and strides do not fit together"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"shape": (5,), "strides": (1,)}, "needs more than its 4 numbers"),
        ({"shape": (2, 2), "strides": (3, 1)}, "needs more than its 4 numbers"),
        ({"offset": 1, "shape": (4,), "strides": (1,)}, "needs more than its 4 numbers"),
        ({"shape": (10**9, 10**9), "strides": (0, 0)}, "needs more than its 4 numbers"),
        ({"offset": -1, "shape": (2,), "strides": (1,)}, FIT),
        ({"offset": 3, "shape": (2,), "strides": (-1,)}, FIT),
        ({"shape": (2, 2), "strides": (1,)}, FIT),
        ({"shape": (2.0,), "strides": (1,)}, FIT),
        (
            {"shape": (4,), "strides": (1,), "size": 10**15},
            "has 16 bytes, not 1000000000000000 x 4",
        ),
        (
            {"shape": (4,), "strides": (1,), "key": "../../0"},
            "is no torch.save file of tensors by name: ",
        ),
    ],
)
def test_tensor_beyond_its_storage_is_refused(tmp_path, numbers, message):
    content = tensor_pickle(**({"offset": 0} | numbers))
    zip_of(tmp_path / "a.pth", content, [("archive/data/0", np.ones(4, "f4").tobytes())])
    small.refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_archives_that_torch_never_writes_are_refused(tmp_path):
    fine = tensor_pickle(0, (4,), (1,))
    data = ("archive/data/0", np.ones(4, "f4").tobytes())
    zip_of(tmp_path / "packed.pth", fine, [data], zipfile.ZIP_DEFLATED)
    small.refuse(tmp_path / "packed.pth", tmp_path / "new", "another kind of zip file")
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(tmp_path / "twice.pth", fine, [data, data])
    small.refuse(tmp_path / "twice.pth", tmp_path / "new", "another kind of zip file")
    zip_of(tmp_path / "big.pth", fine, [data, ("archive/byteorder", "big")])
    small.refuse(tmp_path / "big.pth", tmp_path / "new", "big-endian")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    small.refuse(tmp_path / "other.pth", tmp_path / "new", "another kind of zip file")
