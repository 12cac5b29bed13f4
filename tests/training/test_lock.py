import json
import os
import socket
from pathlib import Path

import pytest

from gt_jax.errors import InputError
from gt_jax.training import lock


def test_lock_names_its_holder_and_is_gone_afterwards(tmp_path):
    with lock.hold(tmp_path / "run"):
        message = rf"another run \(host {socket.gethostname()}, pid {os.getpid()}, since 2"
        with pytest.raises(InputError, match=message), lock.hold(tmp_path / "run"):
            pass
    with lock.hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_folders_are_kept_if_something_is_in_them_or_they_were_there(tmp_path):
    with pytest.raises(ValueError, match="early"), lock.hold(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "config.json").touch()
        raise ValueError("early")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]
    (tmp_path / "empty").mkdir()
    with lock.hold(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_folder_that_another_run_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    opened = Path.open

    def open_late(path, *args, **options):
        monkeypatch.setattr(Path, "open", opened)
        path.parent.rmdir()
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_late)
    with lock.hold(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").is_file()


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "nowhere" / "lock")
    with pytest.raises(FileNotFoundError), lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("left", ["", "not JSON", "[1]", '{"host": "elsewhere", "pid": 1}'])
def test_text_that_a_dead_process_left_locks_nothing(tmp_path, left):
    (tmp_path / "lock").write_text(left)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, True),
        ({"pid": 2**22 + 5}, False),  # above the largest there can be
        ({"boot": "an earlier one"}, False),
        ({"host": "elsewhere"}, True),  # cannot be known
        ({"pid": None}, False),
    ],
)
def test_without_flock_the_text_decides(tmp_path, monkeypatch, change, held):
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / "lock").write_text(json.dumps(lock._this_process() | change))
    if held:
        with pytest.raises(InputError, match=r"delete .*lock if that run is surely over"):
            lock.hold(tmp_path).__enter__()
    else:
        with lock.hold(tmp_path):
            pass
