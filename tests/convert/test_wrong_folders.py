"""Folders that are not what they seem: each is refused in one line that names the fault."""

import numpy as np
import pytest

from gt_jax.convert import export_model, files, import_model
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig
from tests.convert import small

pytest.importorskip("safetensors", reason="holds the weights of an exported model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The content of a hybrid's exported folder: (config.json, tensors, other files)."""
    root = tmp_path_factory.mktemp("exported")
    config = ModelConfig(small.VOCAB, dim=32, layers=2, heads=2, state_size=16)
    small.MODELS["hybrid"] = config
    try:
        export_model(small.save("hybrid", root / "ours"), root / "folder", layout="pytorch")
    finally:
        del small.MODELS["hybrid"]
    found = files.read(root / "folder")
    tensors = {name: tensor.read() for name, tensor in found.tensors.items()}
    tokenizer = (root / "folder" / "tokenizer_gt_jax.json").read_text()
    return found.config, tensors, {"tokenizer_gt_jax.json": tokenizer}


def change(part, **changes):
    """(part of the folder to change, what to change there); None removes an entry."""
    return part, changes


BLOCK = "model.blocks.1."
WRONG = [
    (change("config", fusion="gx"), "model.fusion='gx' must be one of"),
    (change("config", layers=3), "config.json: layers=3, but its tensors have 2"),
    (change("config", layers=None), "config.json: layers is missing"),
    (change("config", vocab_size=30), "config.json: vocab_size=30, but its tensors have 29"),
    (change("config", norm_eps=1e-5), "config.json: norm_eps=1e-05 must be 1e-06 for"),
    (change("config", heads="2"), "model.heads='2' must be a whole number"),
    (change("config", twist="both"), "config.json: twist='both' is unknown and may change"),
    (
        change("config", architecture="mamba2"),
        "norm_eps=1e-06 must be 1e-05 for architecture='mamb",
    ),
    (
        change("config", architecture="mamba2", norm_eps=1e-5),
        r"blocks\.0\.ffn\S+ \[32, 128\] is unknown",
    ),
    (change("config", architecture=None), "config.json: architecture is missing"),
    (change("config", model_type="mamba2"), "config.json: model_type='mamba2' must be 'gt_jax'"),
    (change("config", mix_rank=16), r"time_maa_w1 has shape \[32, 160\], not \[32, 80\]"),
    (change("config", eos_token_id=29), "eos_token_id=29 is no id of this model"),
    (change("tensors", **{f"{BLOCK}mamba.D": None}), r"blocks\.1\.mamba\.D \[1\] is missing"),
    (change("tensors", **{f"{BLOCK}x": np.ones(1, "f4")}), r"blocks\.1\.x \[1\] is unknown"),
    (
        change("tensors", **{"model.head.weight": np.ones((29, 32), "f4")}),
        r"model\.head\.weight \[29, 32\] is unknown",
    ),
    (change("files", **{"tokenizer_gt_jax.json": "{}"}), "tokenizer_gt_jax.json is no tokenizer"),
    (change("files", **{"tokenizer_gt_jax.json": "["}), "tokenizer_gt_jax.json is no JSON object"),
    (
        change("files", **{"tokenizer_gt_jax.json": None, "vocab.txt": "[PAD]\n[UNK]\n"}),
        "vocab.txt is no tokenizer .* --tokenizer=ids does without",
    ),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_folders_are_refused_in_one_line(tmp_path, exported, changed, message):
    parts = dict(zip(("config", "tensors", "files"), map(dict, exported)))
    part, changes = changed
    parts[part] |= changes
    for content in parts.values():
        for name in [name for name, value in content.items() if value is None and name in changes]:
            del content[name]
    folder = tmp_path / "folder"
    files.write_folder(folder, "model.safetensors", parts["tensors"], parts["config"])
    for name, text in parts["files"].items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        import_model(folder, tmp_path / "new")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_lost_its_configuration_is_named(tmp_path, exported):
    files.write_folder(tmp_path / "folder", "model.safetensors", exported[1], {})
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        import_model(tmp_path / "folder", tmp_path / "new")
    with pytest.raises(InputError, match=r"config.json belongs to these weights; give the folder"):
        import_model(tmp_path / "folder" / "model.safetensors", tmp_path / "new")
