"""Two processes with two simulated devices each train like one with four, and end together."""

import re
import signal
import socket

import jax
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.config import Parallel
from gt_jax.errors import InputError
from gt_jax.training import metrics, runtime
from tests.ports import free_port
from tests.training.nursery import Nursery

STEPS = 6
ARGUMENTS = [
    *("--config=tiny", "--config.model.preset=mamba2", "--config.model.dim=32"),
    *("--config.model.layers=1", "--config.model.state_size=8", "--config.train.batch_size=4"),
    *(f"--config.train.steps={STEPS}", "--config.train.seq_len=8", "--config.train.eval_every=3"),
    *("--config.train.eval_tokens=60", "--config.train.sample_tokens=0", "--config.log.every=1"),
    *("--config.checkpoint.every=2", "--config.optim.schedule=constant"),
    *("--config.optim.ema=0.9", "--config.checkpoint.keep=1", "--config.log.tensorboard=false"),
]
SAMPLED = "--config.train.sample_tokens=2"
# Each process has half of every parameter that is cut, and its devices half of each of its rows.
SHARES = ("--config.parallel.fsdp=2", "--config.parallel.sequence=2")


class Pair:
    """Runs of two processes."""

    def __init__(self, folder):
        self.nursery = Nursery(folder, ARGUMENTS, NPROC="2")

    def run(self, workdir, *more, settings=({}, {}), own=((), ()), timeout=60):
        """[(exit status, what it printed)] of both."""
        address = f"127.0.0.1:{free_port()}"
        pids = []
        for i in range(2):
            flags = {"coordinator_address": address, "num_processes": 2, "process_id": i}
            flags = [f"--config.parallel.{name}={value}" for name, value in flags.items()]
            flags += [f"--config.parallel.host_timeout={timeout}", *more, *own[i]]
            pids.append(self.nursery.start(workdir, *flags, devices=2, **settings[i]))
        return [self.nursery.end(pid=pid) for pid in pids]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.nursery.close()


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """A run of two processes that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    ended = pair.run(workdir, *SHARES, SAMPLED)
    assert [status for status, _ in ended] == [0, 0], ended
    lines = [[x for x in text.splitlines() if not re.search("Gloo|peer", x)] for _, text in ended]
    assert "device: 4 x cpu on 2 processes, float32, jit" in lines[0] and not any(lines[1])
    return workdir


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The same run in one process with four devices that share rows alone."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, printed = pair.nursery.run(workdir, SAMPLED, devices=4)
    assert status == 0, printed
    return workdir


def rows(workdir):
    drop = metrics.OF_THE_MACHINE
    return [{k: v for k, v in r.items() if k not in drop} for r in metrics.read(workdir)]


def arrays(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(checkpoint.load(f"{workdir}@last")[1])]


def test_two_processes_train_like_one_with_as_many_devices(straight, alone):
    """But for the order of sums."""
    for one, two in zip(rows(straight), rows(alone), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value == pytest.approx(two[name], rel=1e-3), name
    for one, two in zip(arrays(straight), arrays(alone), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    assert (straight / "samples.txt").read_bytes() == (alone / "samples.txt").read_bytes()
    files = {"config.json", "provenance.jsonl", "metrics.jsonl", "samples.txt", "curve.png"}
    assert {p.name for p in straight.iterdir()} == files | {"checkpoints"}
    assert len((straight / "provenance.jsonl").read_text().splitlines()) == 1


def test_stopped_and_killed_both_end_and_resume_to_the_same_bits(pair, straight, tmp_path):
    workdir = tmp_path / "run"
    term = {"phase": "training", "signals": [signal.SIGTERM], "skip": 1}
    ended = pair.run(workdir, *SHARES, settings=({}, term))
    assert [status for status, _ in ended] == [143, 143], ended
    stopped = checkpoint.steps(workdir)[0]
    assert f"stopped by SIGTERM in process 1 after step {stopped}" in ended[0][1]

    kill = {"phase": "training", "signals": [signal.SIGKILL], "skip": 1}
    ended = pair.run(workdir, *SHARES, settings=({}, kill), timeout=8)
    assert [status for status, _ in ended] == [1, -9], ended
    lines = [line for line in ended[0][1].splitlines() if line.startswith("error: ")]
    expected = f"error: process 1 on {socket.gethostname()} no longer answers; start all processes"
    assert len(lines) == 1 and lines[0].startswith(expected), ended[0][1]
    assert "Traceback" not in ended[0][1]

    ended = pair.run(workdir, *SHARES, SAMPLED)
    assert [status for status, _ in ended] == [0, 0], ended
    assert rows(workdir) == rows(straight)
    assert checkpoint.steps(workdir) == checkpoint.steps(straight)
    assert (workdir / "samples.txt").read_bytes() == (straight / "samples.txt").read_bytes()
    for one, two in zip(arrays(workdir), arrays(straight), strict=True):
        np.testing.assert_array_equal(one, two)


def test_error_of_one_process_is_the_line_of_both(pair, tmp_path):
    other = ((), ("--config.optim.lr=0.5",))
    ended = pair.run(tmp_path / "run", own=other)
    assert [status for status, _ in ended] == [1, 1], ended
    for _, printed in ended:
        assert "optim.lr=0.5 in process 1 on" in printed and "0.003 in process 0" in printed
        assert "Traceback" not in printed


@pytest.mark.parametrize("field, environment", [(2, "1"), (0, "2"), (0, "two")])
def test_processes_without_a_coordinator_are_no_lone_run(field, environment, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", environment)
    name = "parallel.num_processes=2" if field else f"JAX_NUM_PROCESSES={environment}"
    with pytest.raises(
        InputError, match=rf"^{name} needs parallel.coordinator_address .or JAX_COO"
    ):
        runtime._join(Parallel(num_processes=field))


def test_coordinator_that_does_not_answer_is_named_in_time(pair, tmp_path):
    flags = ["coordinator_address=127.0.0.1:9", "num_processes=2", "process_id=1", "host_timeout=1"]
    flags = [f"--config.parallel.{flag}" for flag in flags]
    status, printed = pair.nursery.run(tmp_path / "run", *flags)
    assert status == 1
    assert printed.splitlines()[-1].startswith(
        "error: process 0 does not answer at 127.0.0.1:9 (Connection refused) within "
        "parallel.host_timeout=1 s; start all 2 processes"
    )
