import json

import numpy as np

from gt_jax.training import metrics
from gt_jax.training.plot import draw_curve


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


def test_tensorboard_gets_event_files(tmp_path):
    write(tmp_path, [1, 2], tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_curve_is_drawn_at_150_dpi(tmp_path):
    from PIL import Image

    write(tmp_path, range(1, 30))
    draw_curve(tmp_path, title="a run", unit="nats per character")
    image = Image.open(tmp_path / "curve.png")
    assert image.width > 1000
    assert round(image.info["dpi"][0]) == 150
