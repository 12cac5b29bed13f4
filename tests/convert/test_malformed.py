"""Damaged and hostile checkpoints: refused in one line, nothing run, nothing written."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from gt_jax.convert import files, import_model, pth
from gt_jax.errors import InputError
from tests.convert import small


def refuse(source, target, message):
    """The import fails with one line that matches, and leaves nothing behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as refused:
        import_model(source, target)
    assert "\n" not in str(refused.value)
    assert sorted(target.parent.rglob("*")) == before


def rwkv_arrays(**changes):
    arrays = small.arrays_of("rwkv6", "rwkv-lm") | changes
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.fixture
def good(tmp_path):
    return small.store("rwkv6", "rwkv-lm", tmp_path)


def test_whole_file_is_taken(tmp_path, good):
    import_model(good, tmp_path / "new")


# Tensors that are not those of a model.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.ln1.bias": None}, r"blocks\.1\.ln1\.bias \[64\] is missing"),
        (
            {"blocks.1.ffn.key.weight": np.zeros((64, 224), "f4")},
            r"shape \[64, 224\], not \[224, 64",
        ),
        (
            {"blocks.1.ffn.gate": np.zeros((2, 3), "f4")},
            r"blocks\.1\.ffn\.gate \[2, 3\] is unknown",
        ),
        ({"ln_out.weight": np.zeros(64, "i4")}, "ln_out.weight holds int32, not floating-point"),
        ({"emb.weight": np.zeros(64, "f4")}, "emb.weight is missing, or not of rank 2"),
        ({"blocks.0.att.time_faaaa": np.zeros((5, 7), "f4")}, r"dim=64 must be a multiple of .*=5"),
        ({"blocks.10000000000000000000.ln1.bias": np.zeros(64, "f4")}, r"blocks\.2\..* is missing"),
        (dict.fromkeys(small.arrays_of("rwkv6", "rwkv-lm")), "it holds no tensor"),
        (
            {"emb.weight": None, "head.weight": None},
            "no RWKV-6 or Mamba-2 language model: its first tensor is ln_out.weight",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_tensors_are_named(tmp_path, changes, message):
    files.write(tmp_path / "a.pth", rwkv_arrays(**changes))
    refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_of_many_wrong_tensors_three_are_named(tmp_path):
    arrays = {name: array for name, array in rwkv_arrays().items() if "blocks.1.att" not in name}
    files.write(tmp_path / "a.pth", arrays)
    refuse(tmp_path / "a.pth", tmp_path / "new", r"is missing; .* is missing; and 16 more$")


# Files that are no checkpoint.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no checkpoint"),
        (b"Once upon a time, in a land far away", "damaged or no checkpoint"),
        (b"\xff" * 8 + b"{}", "damaged or no checkpoint"),  # a header of 2^64 bytes
        (struct.pack("<Q", 10**12) + b"{}", "damaged or no checkpoint"),
        (struct.pack("<Q", 2) + b"[]", "damaged or no checkpoint"),
        (b"PK\3\4" + bytes(100), "is no torch.save file of tensors by name: "),
        (pickle.dumps({"a": 1}), "torch's format before 1.6"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if not content.startswith((b"PK", b"\x80")):
        pytest.importorskip("safetensors")
    (tmp_path / "a.pth").write_bytes(content)
    refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_missing_file_is_named(tmp_path):
    refuse(tmp_path / "a.pth", tmp_path / "new", "a.pth does not exist")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_torch_file_is_refused(tmp_path, good, share):
    content = good.read_bytes()
    good.write_bytes(content[: int(len(content) * share)])
    refuse(good, tmp_path / "new", "is no torch.save file of tensors by name: ")


def test_changed_number_in_a_torch_file_is_noticed(tmp_path, good):
    content = bytearray(good.read_bytes())
    content[1000] ^= 1  # in the first tensor
    good.write_bytes(content)
    refuse(good, tmp_path / "new", "is damaged .*CRC")


# Pickles that are more than tensors by name.


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
    refuse(
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
    refuse(tmp_path / "a.pth", tmp_path / "new", message)


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
    refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_archives_that_torch_never_writes_are_refused(tmp_path):
    fine = tensor_pickle(0, (4,), (1,))
    data = ("archive/data/0", np.ones(4, "f4").tobytes())
    zip_of(tmp_path / "packed.pth", fine, [data], zipfile.ZIP_DEFLATED)
    refuse(tmp_path / "packed.pth", tmp_path / "new", "another kind of zip file")
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(tmp_path / "twice.pth", fine, [data, data])
    refuse(tmp_path / "twice.pth", tmp_path / "new", "another kind of zip file")
    zip_of(tmp_path / "big.pth", fine, [data, ("archive/byteorder", "big")])
    refuse(tmp_path / "big.pth", tmp_path / "new", "big-endian")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    refuse(tmp_path / "other.pth", tmp_path / "new", "another kind of zip file")


# safetensors.


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
    refuse(tmp_path / "a.safetensors", tmp_path / "new", message)


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
    files.write(path, rwkv_arrays())
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(path, tmp_path / "new", "damaged or no checkpoint")


# Folders.


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    return small.store("mamba2", "mamba-ssm", tmp_path)


INDEX = "pytorch_model.bin.index.json"


def edit(path, change):
    """Replace a JSON file by change(its content)."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def relist(folder, change):
    edit(folder / INDEX, lambda index: {"weight_map": change(index["weight_map"])})


@pytest.mark.parametrize("name", ["../first.bin", "/etc/passwd", "a/b.bin", "..", ""])
def test_shards_outside_the_folder_are_refused(tmp_path, sharded, name):
    relist(sharded, lambda file_of: file_of | {"backbone.norm_f.weight": name})
    refuse(sharded, tmp_path / "new", "a shard must be a file beside the index")


def test_index_that_does_not_match_its_shards_is_refused(tmp_path, sharded):
    original = (sharded / INDEX).read_text()
    file_of = json.loads(original)["weight_map"]
    first, last = min(file_of.values()), max(file_of.values())
    in_last = next(name for name in file_of if file_of[name] == last)

    for change, message in (
        (lambda m: m | {in_last: first}, rf"holds .*, which {INDEX} says is in"),
        (lambda m: m | {"new": first}, f"{first} lacks new"),
        (lambda m: {k: v for k, v in m.items() if k != in_last}, "says is nowhere"),
        (lambda m: {}, "lists no shards"),
        (lambda m: ["a"], "lists no shards"),
    ):
        (sharded / INDEX).write_text(original)
        relist(sharded, change)
        refuse(sharded, tmp_path / "new", message)
    for text, message in (
        ("{", "is no JSON object"),
        ("[]", "it is a list"),
        ("[" * 100_000, "is no JSON object"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' stands in it twice"),
    ):
        (sharded / INDEX).write_text(text)
        refuse(sharded, tmp_path / "new", message)
    (sharded / INDEX).write_text(original)
    (sharded / first).unlink()
    refuse(sharded, tmp_path / "new", f"{first} is missing, and {INDEX} lists it")


def test_tensor_in_two_shards_is_refused(tmp_path, sharded):
    shards = sorted(sharded.glob("*-of-*"))
    arrays = {name: tensor.read() for name, tensor in pth.read(shards[1]).items()}
    twice = next(iter(pth.read(shards[0])))
    files.write(shards[1], arrays | {twice: np.zeros(3, "f4")})
    refuse(sharded, tmp_path / "new", f"{shards[1].name} holds {twice}, which .* says is in")


def test_folder_without_config_or_weights_is_refused(tmp_path):
    folder = small.store("mamba2", "mamba-ssm", tmp_path)
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere")
    refuse(tmp_path / "elsewhere", tmp_path / "new", "config.json belongs to these weights")
    refuse(folder, tmp_path / "new", "holds no weights: neither model.safetensors nor pytorch")
    (folder / "config.json").unlink()
    refuse(folder, tmp_path / "new", "config.json cannot be read")


# Models that ours cannot be.


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("mamba-ssm", {"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer='Mamba1' must be 'Mamba2'"),
        ("mamba-ssm", {"ssm_cfg": {}}, "ssm_cfg.layer='Mamba1' must be 'Mamba2'"),
        ("mamba-ssm", {"ssm_cfg": 3}, "ssm_cfg must be an object"),
        ("mamba-ssm", {"attn_layer_idx": [9]}, r"attn_layer_idx=\[9\] must be \[\]"),
        ("mamba-ssm", {"tie_embeddings": True}, "lm_head.weight differs from backbone.embedding"),
        ("mamba2-hf", {"n_groups": 8}, "n_groups=8 must divide the 2 heads"),
        ("mamba2-hf", {"n_groups": None}, "n_groups=None must divide the 2 heads"),
        ("mamba2-hf", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 must be 1e-05"),
        ("mamba2-hf", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit=\[0.0, 0.1\] must be"),
    ],
)
def test_other_architectures_are_refused(tmp_path, layout, change, message):
    folder = tmp_path / "folder"
    config = small.config_of("mamba2", layout) | change
    files.write_folder(folder, "pytorch_model.bin", small.arrays_of("mamba2", layout), config)
    refuse(folder, tmp_path / "new", message)


def test_infinity_as_transformers_writes_it_is_read(tmp_path):
    config = small.config_of("mamba2", "mamba2-hf")
    config |= {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    arrays = small.arrays_of("mamba2", "mamba2-hf")
    files.write_folder(tmp_path / "a", "pytorch_model.bin", arrays, config)
    import_model(tmp_path / "a", tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer .*--tokenizer=ids does without"),
        ("rwkv_vocab_v20230424.txt", "1 os.exit() 3", "is no line of an RWKV vocabulary"),
        ("rwkv_vocab_v20230424.txt", "1 'abc' 2", "has 3 bytes, not 2"),
        ("rwkv_vocab_v20230424.txt", "70000 'abc' 3", "has 70001 ids and the model 29"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, good, name, text, message):
    (good.parent / name).write_text(text)
    refuse(good, tmp_path / "new", message)
    import_model(good, tmp_path / "new", tokenizer="ids")
