"""Runs that are killed, stopped, doubled, or out of disk lose nothing and end as documented.

A few of each by default; `--thorough` tries 50 kills, and every signal in every phase.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax import checkpoint, train
from gt_jax.errors import InputError
from gt_jax.training import metrics
from tests.training.nursery import ROOT, Nursery

STEPS = 24
ARGUMENTS = [
    *("--config=configs/tiny.py", "--config.model.preset=mamba2", "--config.model.dim=32"),
    *("--config.model.layers=1", "--config.model.state_size=8", "--config.train.batch_size=2"),
    *(f"--config.train.steps={STEPS}", "--config.train.seq_len=8", "--config.train.eval_every=4"),
    *("--config.train.eval_tokens=64", "--config.train.sample_tokens=4"),
    *("--config.train.sample_every=6", "--config.checkpoint.every=3", "--config.log.every=2"),
    "--config.log.tensorboard=false",
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PHASES = ("looking at checkpoints", "reading the text", "making the state", "compiling", "training")
PHASES += ("evaluating", "saving", "sampling", "finishing", "drawing")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Whose runs take the programs of the first: what is interrupted is rarely their compiling."""
    folder = tmp_path_factory.mktemp("nursery")
    nursery = Nursery(folder / "runs", [*ARGUMENTS, f"--compile_cache={folder / 'kept'}"])
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def straight(nursery, tmp_path_factory):
    """A run that nothing interrupted, its results and seconds."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    nursery.run(workdir)  # compiles
    began = time.monotonic()
    status, _ = nursery.run(workdir.with_name("again"))
    assert status == 0
    assert results(workdir) == results(workdir.with_name("again"))
    return results(workdir), time.monotonic() - began


def results(workdir):
    """What a run leaves: metrics but for the clock's, samples, and the last state's bytes."""
    drop = metrics.OF_THE_MACHINE
    rows = [{k: v for k, v in r.items() if k not in drop} for r in metrics.read(workdir)]
    _, params, _ = checkpoint.load(f"{workdir}@last")
    arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
    return rows, (workdir / "samples.txt").read_bytes(), arrays, checkpoint.steps(workdir)


def test_killed_at_random_moments_it_ends_in_the_same_bits(nursery, straight, tmp_path, request):
    kills, saving = (50 if request.config.getoption("thorough") else 5), 0
    expected, seconds = straight
    moments = random.Random(0)
    runs = 0
    while kills or runs == 0:
        workdir = tmp_path / f"run{runs}"
        status = None
        while status != 0:
            nursery.start(workdir)
            status, printed = nursery.end(moments.uniform(0.1, seconds) if kills else None)
            assert status in (0, -signal.SIGKILL), printed
            kills -= status != 0
            saving += any((workdir / "checkpoints").glob("*tmp*"))
        assert results(workdir) == expected
        assert not list(workdir.rglob("*tmp*")) and (workdir / "curve.png").exists()
        runs += 1
    print(f"{runs} runs, {saving} kills while saving")


def test_every_signal_in_every_phase_saves_and_has_its_own_status(
    nursery, straight, tmp_path, request
):
    chains = 3 if request.config.getoption("thorough") else 1
    for shift in range(chains):
        workdir = tmp_path / f"run{shift}"
        for i, phase in enumerate(PHASES):
            number = SIGNALS[(i + shift) % 3]
            more = ["--compile_cache=none"] if phase == "compiling" else []
            status, printed = nursery.run(workdir, *more, phase=phase, signals=[number])
            assert status == 128 + number, (phase, number, printed)
            assert "Traceback" not in printed and "error" not in printed, (phase, printed)
            assert f"stopped by {number.name}" in printed.splitlines()[-1], (phase, printed)
        status, printed = nursery.run(workdir)
        assert status == 0 and "Traceback" not in printed
        assert results(workdir) == straight[0]


def test_second_signal_ends_the_run_at_once(nursery, tmp_path):
    both = [signal.SIGINT, signal.SIGINT]
    status, printed = nursery.run(tmp_path / "run", phase="evaluating", signals=both)
    assert status == 128 + signal.SIGINT and "stopped by SIGINT again" in printed


def test_second_run_in_a_folder_is_refused_with_the_name_of_the_first(nursery, straight, tmp_path):
    """The first one stands still meanwhile."""
    stop = {"phase": "looking at checkpoints", "signals": [signal.SIGSTOP]}
    pid = nursery.start(tmp_path / "run", **stop)
    try:
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.02)
        message = rf"another run \(host .*, pid {pid}, since 20[^\n]*$"
        with pytest.raises(InputError, match=message):
            train.main(["train", *ARGUMENTS, f"--workdir={tmp_path / 'run'}"])
    finally:
        os.kill(pid, signal.SIGCONT)
    status, printed = nursery.end()
    assert status == 0, printed
    assert results(tmp_path / "run") == straight[0]
    assert not (tmp_path / "run" / "lock").exists()


def test_full_disk_ends_in_one_line_and_soon(nursery, straight, tmp_path):
    """A limit on the size of files stands in; TensorBoard's thread meets it too."""
    workdir, board = tmp_path / "run", "--config.log.tensorboard=true"
    status, printed = nursery.run(workdir, board, phase="saving", skip=2, limit=3000)
    lines = printed.splitlines()
    assert status == 1 and "Traceback" not in printed, printed
    assert lines[-1].startswith("error: ") and sum("error" in line for line in lines) == 1
    assert checkpoint.steps(workdir)
    status, printed = nursery.run(workdir)
    assert status == 0 and "resuming at step" in printed, printed
    assert results(workdir) == straight[0]


def test_console_that_cannot_show_the_sample_ends_no_run(nursery, tmp_path):
    text = tmp_path / "greek.txt"
    text.write_text("αβγδε ζηθ\n" * 200, encoding="utf-8")
    source = f"--config.data.source={text}"
    status, printed = nursery.run(tmp_path / "run", source, ascii_only=True)
    assert status == 0 and "\\u03b1" in printed, printed
    assert "α" in (tmp_path / "run" / "samples.txt").read_text("utf-8")


@pytest.mark.parametrize("document", ["a" * 2000, "ab\ud800c" * 500])
def test_text_that_is_hard_to_show_ends_no_run(nursery, document, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": document}) + "\n")
    source = f"--config.data.source={tmp_path / 'text.jsonl'}"
    status, printed = nursery.run(tmp_path / "run", source)
    assert status == 0 or printed.startswith("error: data.source"), printed
    assert "Traceback" not in printed


def test_closed_pipe_saves_and_has_its_own_status(nursery, tmp_path):
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    command = [sys.executable, "-m", "gt_jax.train", *ARGUMENTS, f"--workdir={tmp_path / 'run'}"]
    command.append(f"--config.data.source={nursery.folder / 'text.txt'}")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(nursery.folder / "xla"), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | cache
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    error = process.communicate()[1].decode()
    assert process.returncode == 141 and "Traceback" not in error, error
    assert checkpoint.steps(tmp_path / "run")
