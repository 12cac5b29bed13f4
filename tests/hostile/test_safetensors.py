"""Mutated safetensors files: each ends in arrays of the file's own bytes, or in an InputError."""

import json
import struct

import numpy as np
import pytest

from gt_jax.convert import files
from gt_jax.errors import InputError
from tests.hostile.mutations import bounded, mutate, mutate_json

pytest.importorskip("safetensors", reason="reads safetensors")
FILES = 1500  # of each of the two kinds

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [48, 58]},
    "c": {"dtype": "F64", "shape": [], "data_offsets": [58, 66]},
    "d": {"dtype": "I64", "shape": [0, 2], "data_offsets": [66, 66]},
}
DATA = np.random.default_rng(0).bytes(66)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "E8M0")


def pack(header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_all(path) -> int:
    try:
        tensors = files.read(path).tensors
        arrays = {name: tensor.read() for name, tensor in tensors.items() if tensor.dtype in FLOATS}
    except InputError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return 0
    data = path.read_bytes()
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert array.tobytes() in data
    return len(arrays)


FLOATS = tuple(files.SAFETENSORS_DTYPES.values())


def test_whole_file_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(pack(HEADER))
    assert read_all(tmp_path / "a.safetensors") == 3


def test_mutated_files(quick_folder):
    path, rng, whole = quick_folder / "a", np.random.default_rng(0), pack(HEADER)
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            path.write_bytes(mutate(rng, whole))
            read_all(path)


def test_mutated_headers(quick_folder):
    path, rng = quick_folder / "a", np.random.default_rng(1)
    with bounded() as next_file:
        for i in range(FILES):
            next_file()
            header = mutate_json(rng, HEADER)
            if i % 3 == 0:
                name = "abcd"[rng.integers(4)]
                ends = sorted(rng.integers(0, 70, 2).tolist())
                header[name] = {
                    "dtype": DTYPES[rng.integers(len(DTYPES))],
                    "shape": rng.integers(0, 5, rng.integers(0, 4)).tolist(),
                    "data_offsets": ends,
                }
            path.write_bytes(pack(header))
            read_all(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
        b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"a": 3}}',
        b"{" + b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}' + b" " * 3_000_000,
    ],
    ids=range(8),
)
def test_headers_out_of_proportion_end_quickly(tmp_path, header):
    (tmp_path / "a").write_bytes(pack(header, bytes(4)))
    with bounded():
        assert read_all(tmp_path / "a") == 0
