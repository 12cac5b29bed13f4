"""Folders and weights that claim to be far larger than they are: refused before anything is built.

Building a model of 1000 blocks takes a minute, and its shapes alone can take all memory.
"""

import json
import logging
import os
import shutil
import time

import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, train
from gt_jax.convert import files, import_model
from gt_jax.errors import InputError
from tests.convert import small
from tests.hostile.mutations import bounded


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return small.save("mamba2", tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def damaged(saved, tmp_path):
    """change(about) -> a copy of the folder whose description says what it returns."""
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / "about" / "metadata"

    def write(change):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        checkpoint.seal(tmp_path / "copy")  # whoever forges a folder forges its checksums
        return tmp_path / "copy"

    return write


def quickly_refused(load, message):
    began = time.process_time()
    with pytest.raises(InputError, match=message) as refused:
        load()
    assert time.process_time() - began < 10
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 1000}, "model.layers=1000, and its files hold 2 blocks"),
        ({"layers": 1}, "model.layers=1, and its files hold 2 blocks"),
        ({"dim": 99968}, r"model.dim=99968, and its files hold an embedding \[29, 64\]"),
        ({"vocab_size": 10**9}, "model.vocab_size=1000000000 .* hold an embedding"),
        ({"state_size": 10**12}, "a size of its model is out of all proportion"),
        ({"state_size": 2**30}, "model.state_size=1073741824 must be at most 1024"),
        ({"state_size": 1000}, "its params have other shapes"),
        ({"layers": "2"}, "model.layers='2' must be a whole number"),
        ({"new_field": 3}, "unexpected keyword argument 'new_field'"),
        ({"architecture": "gpt3"}, "model.architecture='gpt3' must be one of"),
    ],
)
def test_model_larger_than_its_files_is_refused(damaged, fields, message, tmp_path):
    folder = damaged(lambda about: about | {"model": about["model"] | fields})
    quickly_refused(lambda: gt_jax.load(folder), message)
    if message != "its params have other shapes":  # that, training finds when it has compiled
        quickly_refused(lambda: begin_from(folder, tmp_path / "run"), message)


def begin_from(folder, workdir):
    train.main(["train", "--config=tiny", f"--config.model.init_from={folder}",
                f"--workdir={workdir}"])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: [], "is damaged"),
        (lambda about: {}, "model is missing"),
        (lambda about: about | {"config": {}}, "model is missing"),
        (lambda about: about | {"model": 3}, "is damaged"),
        (lambda about: about | {"tokenizer": {"kind": "none"}}, "none is missing"),
        (lambda about: about | {"tokenizer": {"kind": "ids", "vocab_size": 30}},
         "its tokenizer has 30 ids and its model 29"),
        (lambda about: about | {"tokenizer": {"kind": "rwkv-world", "vocabulary": "x"}},
         "the packed vocabulary is damaged"),
    ],
)  # fmt: skip
def test_description_of_another_form_is_refused(damaged, change, message):
    folder = damaged(change)
    quickly_refused(lambda: gt_jax.load(folder), message)
    quickly_refused(lambda: begin_from(folder, folder.parent / "run"), message)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000])
@pytest.mark.parametrize("name", ["about/metadata", "files.json", "params/_METADATA"])
def test_text_that_is_no_json_is_refused(damaged, name, text):
    folder = damaged(lambda about: about)
    (folder / name).write_bytes(text)
    if name != "files.json":
        checkpoint.seal(folder)
    quickly_refused(lambda: gt_jax.load(folder), "is damaged")


def test_loading_a_converted_model_prints_nothing(saved, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="absl"):
        logging.getLogger("absl").addHandler(caplog.handler)
        gt_jax.load(saved)
        logging.getLogger("absl").removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")


def test_weights_that_name_thousands_of_blocks_are_refused(tmp_path):
    """Each block has all its tensors, of one number."""
    block = [n for n in small.arrays_of("rwkv6", "rwkv-lm") if n.startswith("blocks.1.")]
    arrays = dict(small.arrays_of("rwkv6", "rwkv-lm"))
    for number in range(2, 400):
        names = [name.replace("blocks.1.", f"blocks.{number}.") for name in block]
        arrays |= dict.fromkeys(names, np.zeros(1, np.float32))
    files.write(tmp_path / "a.pth", arrays)
    quickly_refused(lambda: import_model(tmp_path / "a.pth", tmp_path / "new"), "has shape")


@pytest.mark.parametrize("layout", ["rwkv-lm", "fla"])
def test_weights_that_claim_a_great_width_are_refused(tmp_path, layout):
    """An embedding of one row of a million channels: its square matrices would have 4 TB."""
    arrays = small.arrays_of("rwkv6", layout)
    name = next(name for name in arrays if "emb" in name)
    arrays[name] = np.zeros((1, 1_000_000), np.float32)
    if layout == "rwkv-lm":
        files.write(tmp_path / "a", arrays)
    else:
        sizes = ("vocab_size", "hidden_size", "intermediate_size")
        ranks = ("proj_low_rank_dim", "gate_low_rank_dim")
        config = small.config_of("rwkv6", layout) | dict.fromkeys([*sizes, *ranks])
        files.write_folder(tmp_path / "a", "pytorch_model.bin", arrays, config)
    with bounded():
        quickly_refused(
            lambda: import_model(tmp_path / "a", tmp_path / "new"),
            r"a model of vocabulary 1, dim 1,000,000 .* has over [\d,]+ numbers, and the tensors",
        )


@pytest.mark.parametrize("name", ["files.json", "about/metadata", "params/extra"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(saved, tmp_path, name, kind):
    """Reading them would never end, or take all memory."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    quickly_refused(lambda: gt_jax.load(folder), f"{name}.* is no regular file")
