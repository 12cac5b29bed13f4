"""Damaged and hostile checkpoints: refused in one line, nothing run, nothing written."""

import pickle
import struct

import numpy as np
import pytest

from gt_jax.convert import files, import_model
from tests.convert import small


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
    files.write(tmp_path / "a.pth", small.rwkv_arrays(**changes))
    small.refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_of_many_wrong_tensors_three_are_named(tmp_path):
    arrays = {
        name: array for name, array in small.rwkv_arrays().items() if "blocks.1.att" not in name
    }
    files.write(tmp_path / "a.pth", arrays)
    small.refuse(tmp_path / "a.pth", tmp_path / "new", r"is missing; .* is missing; and 16 more$")


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
    small.refuse(tmp_path / "a.pth", tmp_path / "new", message)


def test_missing_file_is_named(tmp_path):
    small.refuse(tmp_path / "a.pth", tmp_path / "new", "a.pth does not exist")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_torch_file_is_refused(tmp_path, good, share):
    content = good.read_bytes()
    good.write_bytes(content[: int(len(content) * share)])
    small.refuse(good, tmp_path / "new", "is no torch.save file of tensors by name: ")


def test_changed_number_in_a_torch_file_is_noticed(tmp_path, good):
    content = bytearray(good.read_bytes())
    content[1000] ^= 1  # in the first tensor
    good.write_bytes(content)
    small.refuse(good, tmp_path / "new", "is damaged .*CRC")


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
    small.refuse(folder, tmp_path / "new", message)


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
    small.refuse(good, tmp_path / "new", message)
    import_model(good, tmp_path / "new", tokenizer="ids")
