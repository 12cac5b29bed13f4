"""Which files the code of a process is in, and that no change of one stays unseen."""

import os
import py_compile
import runpy
import sys
import time
from pathlib import Path

import pytest

from gt_jax import code_files


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("factor = 3")
    return file


def stamp(file):
    return code_files.stamps([str(file)], {})[str(file)]


def edit(file):
    """Other bytes of the same size and time, as `touch -r` leaves them."""
    about = file.stat()
    time.sleep(0.02)  # longer than the clock of a file system stands still
    file.write_text(file.read_text().replace("3", "4"))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_what_a_config_runs_and_reads_is_found_and_nothing_else(tmp_path, module):
    py_compile.compile(str(module))
    script, text, missing = (tmp_path / name for name in ("script.py", "text.txt", "missing.txt"))
    script.write_text("import module")
    text.write_text("")
    with pytest.MonkeyPatch.context() as patched, code_files.reading() as read:
        patched.syspath_prepend(tmp_path)
        runpy.run_path(str(script))
        os.close(os.open(text, os.O_RDONLY))
        (tmp_path / "written.txt").write_text("")
        sys.audit("open", "an event of another library")
        assert not missing.exists()
        with pytest.raises(FileNotFoundError):
            missing.read_text()
    del sys.modules["module"]
    (tmp_path / "script.py").read_text()
    (tmp_path / "written.txt").read_text()
    found = {file for file in read if Path(file).parent == tmp_path}
    assert found == {str(file) for file in (module, script, text, missing)}  # no bytecode


def test_file_is_known_by_its_bytes_if_it_is_missing_or_by_when_it_changed(module, monkeypatch):
    known = stamp(module)
    module.touch()
    assert stamp(module) == known
    edit(module)
    changed = stamp(module)
    assert changed not in (known, "")
    monkeypatch.setattr(code_files, "_installed", lambda: (f"{module.parent}{os.sep}",))
    known = stamp(module)
    edit(module)
    assert stamp(module) not in (known, changed, "")
    module.unlink()
    assert stamp(module) == "none"


def test_large_file_is_known_without_its_bytes(module, monkeypatch):
    os.truncate(module, 2**42)  # reading it would take an hour
    known = stamp(module)
    time.sleep(0.02)
    module.touch()
    assert stamp(module) not in (known, "")


def test_file_is_known_as_it_was_first_seen(module):
    seen = {}
    known = code_files.stamps([str(module)], seen)
    edit(module)
    assert code_files.stamps([str(module)], seen) == known != code_files.stamps([str(module)], {})


def test_source_whose_bytecode_is_of_an_earlier_one_is_not_known(module):
    """Python runs the earlier code until the bytecode is deleted: size and time agree."""
    bytecode = Path(py_compile.compile(str(module)))
    assert stamp(module) != ""
    edit(module)
    assert runpy.run_path(str(bytecode))["factor"] == 3
    assert stamp(module) == ""
    bytecode.unlink()
    assert stamp(module) != ""


def test_source_that_was_copied_after_its_bytecode_is_known(module):
    py_compile.compile(str(module))
    known = stamp(module)
    time.sleep(0.02)
    module.chmod(0o600)
    assert stamp(module) == known != ""


@pytest.mark.parametrize("name", ["archive.zip/inside.py", "folder", "pipe"])
def test_what_is_no_file_is_not_known(tmp_path, name):
    (tmp_path / "archive.zip").write_bytes(b"PK")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert stamp(tmp_path / name) == ""


def test_link_that_was_moved_is_a_change_of_what_it_leads_to(tmp_path, module):
    """As a folder `current` that is moved to a release whose files are older."""
    before = time.time()
    time.sleep(0.02)
    (tmp_path / "current").symlink_to(tmp_path)
    assert code_files.newest_change([str(module)]) < before
    assert code_files.newest_change([str(tmp_path / "current" / module.name)]) > before
    assert code_files.newest_change([str(tmp_path / "missing.py")]) < before


def test_process_start_is_known_where_linux_says_it():
    age = time.time() - (code_files.process_start() or 0)
    assert sys.platform != "linux" or 0 < age < 24 * 3600
