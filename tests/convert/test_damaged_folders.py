"""Folders of shards whose index, config or files do not match: refused in one line."""

import json

import numpy as np
import pytest

from gt_jax.convert import files, pth
from tests.convert import small


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
    small.refuse(sharded, tmp_path / "new", "a shard must be a file beside the index")


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
        small.refuse(sharded, tmp_path / "new", message)
    for text, message in (
        ("{", "is no JSON object"),
        ("[]", "it is a list"),
        ("[" * 100_000, "is no JSON object"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' stands in it twice"),
    ):
        (sharded / INDEX).write_text(text)
        small.refuse(sharded, tmp_path / "new", message)
    (sharded / INDEX).write_text(original)
    (sharded / first).unlink()
    small.refuse(sharded, tmp_path / "new", f"{first} is missing, and {INDEX} lists it")


def test_tensor_in_two_shards_is_refused(tmp_path, sharded):
    shards = sorted(sharded.glob("*-of-*"))
    arrays = {name: tensor.read() for name, tensor in pth.read(shards[1]).items()}
    twice = next(iter(pth.read(shards[0])))
    files.write(shards[1], arrays | {twice: np.zeros(3, "f4")})
    small.refuse(sharded, tmp_path / "new", f"{shards[1].name} holds {twice}, which .* says is in")


def test_folder_without_config_or_weights_is_refused(tmp_path):
    folder = small.store("mamba2", "mamba-ssm", tmp_path)
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere")
    small.refuse(tmp_path / "elsewhere", tmp_path / "new", "config.json belongs to these weights")
    small.refuse(
        folder, tmp_path / "new", "holds no weights: neither model.safetensors nor pytorch"
    )
    (folder / "config.json").unlink()
    small.refuse(folder, tmp_path / "new", "config.json cannot be read")
