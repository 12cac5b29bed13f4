import json

import numpy as np

from gt_jax.training import metrics
from gt_jax.training.plot import draw_curve, step_of


def write(workdir, steps, *, start=0, tensorboard=False):
    log = metrics.Metrics(workdir, start=start, tensorboard=tensorboard)
    for step in steps:
        row = {
            "loss": np.float32(4 / step),
            "lr": 1e-3,
            "gate": np.array([0.3, 0.25]),
            "step": step,
        }
        log.write(row | ({"validation_loss": 5 / step} if step % 2 else {}))
    log.close()


def test_rows_come_back_and_what_is_not_finite_is_null(tmp_path):
    log = metrics.Metrics(tmp_path, start=0, tensorboard=False)
    row = {"loss": np.float32("nan"), "skipped": np.int32(2), "gate": np.array([0.5, np.inf])}
    log.write({**row, "step": 1})
    log.close()
    assert metrics.read(tmp_path) == [{"step": 1, "loss": None, "skipped": 2, "gate": [0.5, None]}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resumed_run_drops_later_rows_and_a_cut_off_one(tmp_path):
    write(tmp_path, range(1, 9))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    write(tmp_path, range(6, 11), start=5)
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 11))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def events(workdir):
    """{tag: {step: value}} of the event files of a run, and how many values there are in all."""
    from tensorboardX.proto.event_pb2 import Event

    found, count = {}, 0
    for file in (workdir / "tensorboard").glob("events.out.tfevents.*"):
        content, place = file.read_bytes(), 0
        while place < len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
                count += 1
    return found, count


def test_tensorboard_has_all_rows_once_after_a_flush_and_after_a_kill(tmp_path):
    """50 steps of which the process wrote only what a checkpoint flushed, then 10 more."""
    killed = metrics.Metrics(tmp_path, start=0, tensorboard=True)
    for step in range(1, 51):
        killed.write({"step": step, "loss": 1 / step, "gate": [0.5, None]})
        if step == 40:
            killed.flush()
            assert sorted(events(tmp_path)[0]["loss"]) == list(range(1, 41))
    # No close, as after kill -9: what the process had not flushed is lost.
    log = metrics.Metrics(tmp_path, start=45, tensorboard=True)
    assert sorted(events(tmp_path)[0]["loss"]) == list(range(1, 46))
    for step in range(46, 61):
        log.write({"step": step, "loss": 2 / step, "gate": [0.5, None]})
    log.close()
    found, count = events(tmp_path)
    assert set(found) == {"loss", "gate/0"} and count == 2 * 60
    for step in range(1, 61):
        assert abs(found["loss"][step] - (1 if step <= 45 else 2) / step) < 1e-6


def test_curve_is_drawn_at_150_dpi(tmp_path):
    from PIL import Image

    write(tmp_path, range(1, 30))
    curve = tmp_path / "curve.png"
    assert step_of(curve) is None
    curve.write_bytes(draw_curve(tmp_path, title="a run", unit="nats per character"))
    assert step_of(curve) == 29
    image = Image.open(curve)
    assert image.width > 1000
    assert round(image.info["dpi"][0]) == 150
