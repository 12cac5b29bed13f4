"""wandb and trackio: imported where asked, they get every row, offline too, and end no run."""

import json
import os
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from gt_jax.config import Log
from gt_jax.errors import InputError
from gt_jax.training import loggers, metrics

ROWS = [{"step": n, "loss": 1 / n, "gate": [0.5, 0.25]} for n in range(1, 5)]


def log_rows(module, workdir, rows, *, start=0):
    service = loggers.Service(module, workdir, {"optim": {"lr": 1e-3}}, "tests")
    log = metrics.Metrics(workdir, start=start, tensorboard=False, services=[service])
    for row in rows:
        log.write(row)
    log.close()


def test_lists_are_numbered_and_what_is_not_finite_is_left_out():
    row = {"step": 3, "loss": None, "gate": [0.5, None], "tokens": 64}
    assert loggers.scalars(row) == {"gate/0": 0.5, "tokens": 64}


def test_nothing_is_imported_unless_asked_for():
    code = (
        "import sys, gt_jax.training.loggers as l; from gt_jax.config import Log;"
        "l.import_services(Log()); assert not {'wandb', 'trackio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_event_files_need_no_torch_and_leave_the_package_whole(tmp_path):
    """Where torch is installed, tensorboardX imports it: seconds at the start of every run."""
    for name in ("torch", "onnx", "caffe2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} is imported')")
    code = f"""
import sys
from gt_jax.training.loggers import TensorBoard
board = TensorBoard({str(tmp_path)!r}, [{{"step": 1, "loss": 0.5}}])
board.close()
assert "tensorboardX" not in sys.modules
for name in ("torch", "onnx", "caffe2"):
    sys.modules[name] = None  # not installed
import tensorboardX
from tensorboardX.proto.event_pb2 import Event
assert tensorboardX.SummaryWriter and tensorboardX.FileWriter and Event is board._event
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"log\.wandb=True needs a package: pip install wandb"):
        loggers.import_services(Log(wandb=True))


def test_service_that_fails_is_said_once_and_ends_no_run(tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("no\nnetwork")

    broken = types.SimpleNamespace(__name__="wandb", init=lambda **_: None, log=fail, finish=fail)
    log_rows(broken, tmp_path, ROWS)
    said = capsys.readouterr().out
    assert said.count("wandb gets no more numbers: no network\n") == 1
    assert metrics.read(tmp_path) == [{**row, "loss": float(f"{row['loss']:.6g}")} for row in ROWS]
    broken.init = fail
    with pytest.raises(InputError, match=r"log\.wandb=True: no network; set WANDB_MODE=offline"):
        log_rows(broken, tmp_path, ROWS)


def test_wandb_offline_keeps_every_row_under_the_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="an optional logger")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_rows(wandb, tmp_path / "run", ROWS[:3])
    time.sleep(1.1)  # wandb names folders by the second
    log_rows(wandb, tmp_path / "run", ROWS[3:], start=3)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # both are of one run
    found = {}
    for file in files:
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                row = {".".join(i.nested_key) or i.key: json.loads(i.value_json)
                       for i in record.history.item}  # fmt: skip
                found[row["_step"]] = row
    assert {step: row["loss"] for step, row in found.items()} == {
        row["step"]: pytest.approx(row["loss"], rel=1e-5) for row in ROWS
    }
    assert found[4]["gate/1"] == 0.25


def records(file):
    """The records of a wandb file: a log as LevelDB has it, behind 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_trackio_keeps_every_row_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="an optional logger")
    (tmp_path / "run").mkdir()
    log_rows(trackio, tmp_path / "run", ROWS[:3])
    log_rows(trackio, tmp_path / "run", ROWS[3:], start=3)
    (run,) = trackio.Api().runs("tests")
    assert run.name.startswith("run-") and run.config["optim"] == {"lr": 1e-3}
    logged = trackio.sqlite_storage.SQLiteStorage.get_logs("tests", run.name, run_id=run.id)
    found = {row["step"]: (row["loss"], row["gate/1"]) for row in logged}
    assert found == {row["step"]: (pytest.approx(row["loss"], rel=1e-5), 0.25) for row in ROWS}
    assert len(logged) == len(ROWS)
