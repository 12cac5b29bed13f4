"""Files that hold something else than RWKV-6 or Mamba-2 are called by their names."""

import pytest

from gt_jax.convert import LAYOUTS, files, import_model
from gt_jax.errors import InputError
from tests.convert import small


def tensors_of(name, layout, rename):
    arrays = small.arrays_of(name, layout)
    return {rename(key): array for key, array in arrays.items()}


@pytest.mark.parametrize(
    ("model", "name", "layout", "rename"),
    [
        ("RWKV-7", "rwkv6", "rwkv-lm", lambda k: k.replace("time_maa_x", "x_r")),
        ("RWKV-7", "rwkv6", "fla", lambda k: k.replace("bonus", "r_k")),
        ("RWKV-5", "rwkv6", "rwkv-lm", lambda k: k.replace("time_maa", "time_mix")),
        ("RWKV-5", "rwkv6", "rwkv-hf", lambda k: k.replace("time_maa", "time_mix")),
        ("RWKV-4", "rwkv6", "rwkv-lm", lambda k: k.replace("time_faaaa", "time_first")),
        ("Mamba-1", "mamba2", "mamba-ssm", lambda k: k.replace("dt_bias", "dt_proj.weight")),
        ("Mamba-1", "mamba2", "mamba2-hf", lambda k: k.replace("mixer.D", "mixer.x_proj.weight")),
        ("a transformer", "rwkv6", "fla", lambda k: k.replace("attn.o_proj", "self_attn.q_proj")),
    ],
)
def test_relatives_are_called_by_their_names(tmp_path, model, name, layout, rename):
    arrays = tensors_of(name, layout, rename)
    if LAYOUTS[layout].weights is None:
        files.write(tmp_path / "a", arrays)
    else:
        files.write_folder(
            tmp_path / "a", "pytorch_model.bin", arrays, small.config_of(name, layout)
        )
    with pytest.raises(InputError, match=f"this is {model}, as its .* tells; RWKV-6 or Mamba-2"):
        import_model(tmp_path / "a", tmp_path / "new")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\3\0\0\0", "it is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it only points to the weights"),
        (b"\x1f\x8b\x08", "it is packed with gzip"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"\x93NUMPY\1\0", "it is one NumPy array"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_names(tmp_path, start, message):
    pytest.importorskip("safetensors", reason="tells that it is none of its own")
    (tmp_path / "a").write_bytes(start + bytes(100))
    with pytest.raises(InputError, match=f"a holds no weights: {message}"):
        import_model(tmp_path / "a", tmp_path / "new")
