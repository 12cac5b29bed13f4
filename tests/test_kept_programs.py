"""Programs that a command keeps whole: found while all that tracing saw is as it was, else not."""

import importlib
import os
import pickle
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import gt_jax
from gt_jax import code_files, compilation, kept_programs
from gt_jax.config import default_config, from_config_dict
from gt_jax.generation import weights
from gt_jax.train import train
from gt_jax.training import job

COMMAND = "gt_jax.train"
written = threading.Event()


@pytest.fixture(scope="module")
def without_cache_of_jax():
    """Yields a list, for `begin` to note that what JAX imports for a first program is imported."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # an earlier test may have found out that there is one
    yield []
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


@pytest.fixture
def begin(tmp_path, monkeypatch, without_cache_of_jax):
    """begin(*read) as in a new `python -m gt_jax.train`, with a cache of its own."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name=COMMAND))
    monkeypatch.setattr(code_files, "process_start", lambda: time.time() + 1e6)
    monkeypatch.setattr(kept_programs, "_command", None)
    keep = kept_programs._keep
    monkeypatch.setattr(kept_programs, "_keep", lambda *args: (keep(*args), written.set()))
    while len(without_cache_of_jax) < 2:  # a process imports some modules in its first program
        without_cache_of_jax.append(kept_programs.begin(COMMAND, tmp_path / "imports"))
        run(2)
    return lambda *read: kept_programs.begin(COMMAND, tmp_path / "xla", *read)


def run(factor, identity="it", table=None):
    """(whether it was lowered, its result) of a program; its code may read the factor in a file."""
    lowered = []

    def lower():
        lowered.append(int(table.read_text()) if table else factor)
        return jax.jit(lambda x: {"sum": (x * lowered[0]).sum(), "none": None}).lower(jnp.ones(7))

    written.clear()  # set by programs of a test before, which nobody waited for
    kept = kept_programs.find(["step"], identity)
    result = compilation.compile_side_by_side({"step": lower}, kept)["step"].result()
    if kept and lowered:  # it is written behind the result
        assert written.wait(120)
    return bool(lowered), float(result(jnp.ones(7))["sum"])


def kept_files(tmp_path):
    return [file for file in (tmp_path / "xla" / "programs").glob("*") if not file.suffix]


def test_second_process_takes_the_program_of_the_first(begin):
    begin()
    assert run(3) == (True, 21)
    begin()
    assert run(4) == (False, 21)  # not even lowered
    assert run(4, "another config") == (True, 28)


def test_only_the_command_itself_with_a_cache_of_ours_keeps_programs(begin, monkeypatch, tmp_path):
    kept_programs.begin(COMMAND, None)
    assert kept_programs.find(["step"], "it") == {}
    for spec in (SimpleNamespace(name="cProfile"), None):
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        begin()
        assert kept_programs.find(["step"], "it") == {} and run(3) == (True, 21)
    assert not (tmp_path / "xla").exists()


def test_numbers_are_counted_once_as_long_as_nothing_changes(begin, monkeypatch):
    counted = []

    def count():
        counted.append(1)
        return {"parts": {"rwkv": 3, "embedding": 2, "total": 5}, "trained": 5}

    ask = lambda identity="it": kept_programs.numbers("counts", identity, count)
    monkeypatch.setattr(kept_programs, "_command", None)
    assert ask() == ask() and len(counted) == 2  # nothing is kept for a library
    begin()
    first = ask()
    begin()
    assert ask() == first == count() and list(ask()["parts"]) == ["rwkv", "embedding", "total"]
    assert len(counted) == 4  # one of them in the line above
    ask("another config")
    monkeypatch.setenv("XLA_FLAGS_OF_MINE", "changed")
    begin()
    ask()
    assert len(counted) == 6


def test_change_of_an_imported_or_named_file_compiles_anew(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # that of the old source would be run
    monkeypatch.syspath_prepend(tmp_path)
    module, config = tmp_path / "imported_by_the_run.py", tmp_path / "config.py"
    module.write_text("factor = 3")
    config.write_text("first")
    importlib.import_module("imported_by_the_run")
    try:
        begin(config)
        assert run(3) == (True, 21)
        begin(config)
        assert run(3) == (False, 21)
        for file in (module, config):
            about = file.stat()
            file.write_text(file.read_text().replace("3", "4").replace("first", "other"))
            os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # bytes count, not times
            begin(config)
            assert run(4) == (True, 28)
            begin(config)
            assert run(5) == (False, 28)
    finally:
        del sys.modules["imported_by_the_run"]


def test_change_of_a_file_that_the_code_reads_while_it_is_traced_compiles_anew(begin, tmp_path):
    table = tmp_path / "table.txt"
    for factor in (3, 4):
        table.write_text(str(factor))
        begin()
        assert run(None, table=table) == (True, 7 * factor)
        begin()
        assert run(5) == (False, 7 * factor)
        assert kept_programs.numbers("counts", "it", lambda: [table.read_text()]) == [str(factor)]


def test_module_that_was_not_imported_then_compiles_anew(begin, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    begin()
    assert run(3) == (True, 21)
    (tmp_path / "imported_later.py").write_text("")
    importlib.import_module("imported_later")
    try:
        begin()
        assert run(4) == (True, 28)
    finally:
        del sys.modules["imported_later"]


def test_file_that_changed_after_the_process_began_keeps_nothing(begin, tmp_path, monkeypatch):
    """The process may have imported what was there before."""
    config = tmp_path / "config.py"
    config.write_text("")
    monkeypatch.setattr(code_files, "process_start", lambda: config.stat().st_ctime)
    begin(config)
    assert run(3) == (True, 21)
    begin(config)
    assert run(4) == (True, 28)


def test_module_that_was_imported_then_and_is_not_now_compiles_anew(begin, tmp_path, monkeypatch):
    """A config may import it where a file exists; it may have changed the code in memory."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_once.py").write_text("")
    importlib.import_module("imported_once")
    begin()
    assert run(3) == (True, 21)
    del sys.modules["imported_once"]
    begin()
    assert run(4) == (True, 28)


COUNTS = {"XLA_FLAGS_OF_MINE": True, "SLURM_ARRAY_TASK_ID": True, "SLURM_JOB_ID": False}


@pytest.mark.parametrize("name, counts", COUNTS.items())
def test_environment_variable_compiles_anew_unless_of_a_session(begin, monkeypatch, name, counts):
    begin()
    run(3)
    monkeypatch.setenv(name, "changed")
    begin()
    assert run(4) == ((True, 28) if counts else (False, 21))


def test_setting_of_jax_compiles_anew(begin):
    begin()
    run(3)
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert run(4) == (True, 28)
    finally:
        jax.config.update("jax_default_matmul_precision", before)


DAMAGES = ["cut", "empty", "changed", "writable", "folder", "huge", "pipe", "of another program"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_file_compiles_anew(begin, tmp_path, damage):
    begin()
    run(3)
    [file] = kept_files(tmp_path)
    written = file.read_bytes()
    if damage == "cut":
        file.write_bytes(written[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "changed":
        file.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    elif damage == "writable":  # loading a program runs what is in it
        file.chmod(0o666)
    elif damage == "huge":  # more than fits in memory
        os.truncate(file, 2**43)
    elif damage == "of another program":
        file.rename(kept_programs.find(["step"], "another")["step"].path)
    else:
        file.unlink()
        file.mkdir() if damage == "folder" else os.mkfifo(file)
    begin()
    assert run(4, "another" if damage == "of another program" else "it") == (True, 28)


def test_file_of_another_user_is_not_even_read(begin, tmp_path, monkeypatch):
    begin()
    run(3)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(pickle, "loads", lambda _: pytest.fail("was loaded"))
    begin()
    assert run(4) == (True, 28)


def test_program_with_calls_that_lowering_sets_up_is_not_kept(begin, tmp_path):
    """LAPACK's functions on a CPU are found while lowering: the next process would crash."""
    x = jnp.eye(3)
    begin()
    kept = kept_programs.find(["qr"], "it")
    programs = {"qr": lambda: jax.jit(jnp.linalg.qr).lower(x)}
    written.clear()
    compilation.compile_side_by_side(programs, kept)["qr"].result()
    assert written.wait(120) and not (tmp_path / "xla").exists()
    written.clear()


def test_program_from_the_cache_of_jax_is_not_kept(begin, tmp_path, monkeypatch):
    begin()
    kept = kept_programs.find(["step"], "it")["step"]
    hit = lambda: jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    kept_programs.compile_and_keep(kept, SimpleNamespace(compile=hit), (), lambda _: None)
    assert not kept.path.exists()


def test_system_that_does_not_say_what_it_is_keeps_nothing(begin, monkeypatch, tmp_path):
    hidden = lambda: (_ for _ in ()).throw(PermissionError("/proc/cpuinfo"))
    monkeypatch.setattr(kept_programs, "_host", hidden)
    begin()
    assert kept_programs.find(["step"], "it") == {} and run(3) == (True, 21)


def test_oldest_programs_go_first(begin, tmp_path, monkeypatch):
    begin()
    for n, identity in enumerate("abc"):
        run(3, identity)
        kept = kept_programs.find(["step"], identity)["step"]
        assert kept.program.result() is not None  # which makes it the one used last
        os.utime(kept.path, (n, n))
    largest = max(file.stat().st_size for file in kept_files(tmp_path))
    monkeypatch.setattr(kept_programs, "MOST_BYTES", 2.5 * largest)
    run(3, "d")
    left = [kept_programs.find(["step"], x)["step"].path.exists() for x in "abcd"]
    assert left == [False, False, True, True]


def test_what_cannot_be_deleted_or_marked_as_used_stops_nothing(begin, tmp_path, monkeypatch):
    begin()
    run(3, "a")
    folder = tmp_path / "xla" / "programs"
    [old] = kept_files(tmp_path)
    (folder / "of somebody").mkdir()
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    os.utime(old, (1, 1))
    monkeypatch.setattr(kept_programs, "MOST_BYTES", old.stat().st_size + 100)
    run(3, "b")
    assert not old.exists()
    monkeypatch.setattr(os, "utime", lambda _: (_ for _ in ()).throw(PermissionError()))
    begin()
    assert run(4, "b") == (False, 21)  # from a disk that nobody may write


FIELDS = {
    "model.preset": "gpt2",
    "model.dim": 16,
    "model.layers": 1,
    "model.heads": 2,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.steps": 3,
    "train.eval_every": 0,
    "train.sample_tokens": 35,
    "checkpoint.every": 2,
    "log.tensorboard": False,
}


def config_of(folder):
    config = default_config()
    (folder / "text.txt").write_text("to be or not to be, that is\n" * 60)
    config.update_from_flattened_dict(FIELDS | {"data.source": str(folder / "text.txt")})
    return from_config_dict(config)


def arrays(workdir):
    return jax.tree.leaves(gt_jax.load(workdir / "checkpoints" / "3")[1])


def test_runs_of_kept_programs_equal_one_traced_to_the_bit(begin, tmp_path, monkeypatch, no_curve):
    config, sample = config_of(tmp_path), lambda run: (run / "samples.txt").read_text()
    train(config, tmp_path / "traced")
    # Tests share a process, in which one run imports what the next one would not yet have.
    monkeypatch.setattr(code_files, "imported", lambda read: {kept_programs.__file__})
    begin()
    train(config, tmp_path / "first")
    until = time.monotonic() + 120
    while len(kept_files(tmp_path)) < 6 and time.monotonic() < until:
        time.sleep(0.05)  # written behind the run
    shutil.copytree(tmp_path / "first", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "3")
    with monkeypatch.context() as patched:
        begin()
        patched.setattr(compilation, "without_collector", lambda lower: pytest.fail("traced"))
        patched.setattr(job, "_count", lambda *_: pytest.fail("counted"))
        patched.setattr(weights, "_split", lambda *_: pytest.fail("traced for a sample"))
        train(config, tmp_path / "second")
        train(config, tmp_path / "resumed")
    expected = arrays(tmp_path / "traced")
    for name in ("first", "second", "resumed"):
        jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / name), expected)
        assert sample(tmp_path / "traced") == sample(tmp_path / name) != ""
