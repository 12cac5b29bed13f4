"""Damaged safetensors files, and those of other numbers: refused in one line."""

import json
import struct

import pytest

from gt_jax.convert import files
from tests.convert import small


def safetensors_of(path, header, size):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def one(dtype="F32", shape=(1,), ends=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": one(), "b": one()}, "damaged or no checkpoint"),  # both in one place
        ({"a": one(ends=(0, 8))}, "damaged or no checkpoint"),
        ({"a": one(shape=(2,))}, "damaged or no checkpoint"),
        ({"a": one(shape=(-1,))}, "damaged or no checkpoint"),
        ({"a": one("F99")}, "damaged or no checkpoint"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(one()).encode(),) * 2), "'a' stands in it twice"),
        (b"{", "damaged or no checkpoint"),
        ({"emb.weight": one("I32", (1, 1))}, "time_faaaa is missing"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path, header, message):
    pytest.importorskip("safetensors")
    safetensors_of(tmp_path / "a.safetensors", header, 4)
    small.refuse(tmp_path / "a.safetensors", tmp_path / "new", message)


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3"])
def test_safetensors_of_other_numbers_are_refused(tmp_path, dtype):
    pytest.importorskip("safetensors")
    header = {"a": one(dtype, (1,), (0, 8 if dtype == "I64" else 1))}
    safetensors_of(tmp_path / "a.safetensors", header, 8 if dtype == "I64" else 1)
    tensor = files.read(tmp_path / "a.safetensors").tensors["a"]
    assert tensor.dtype == dtype


def test_truncated_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    files.write(path, small.rwkv_arrays())
    path.write_bytes(path.read_bytes()[:-1000])
    small.refuse(path, tmp_path / "new", "damaged or no checkpoint")
