"""Works in processes of their own are measured in turn, whatever becomes of the others."""

import contextlib
import os
import threading
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import jax
import pytest

from experiments.lab import workers
from gt_jax.errors import InputError

_ready = {}


def prepare(name):
    _ready[name] = jax.config.read("jax_cuda_visible_devices")


def measure(name):
    return name, _ready[name], time.time()


def fail(name):
    raise RuntimeError(f"no {name}\nsecond line")


def refuse(name):
    raise InputError(f"{name} is wrong")


def sleep(name):
    time.sleep(600)


def prepare_to_die(name):
    threading.Timer(0.2, os._exit, (9,)).start()  # as of a machine whose memory is full


def test_works_are_measured_in_turn_in_processes_that_see_their_cards(capfd, monkeypatch):
    kinds = {"one": prepare, "slow": sleep, "bad": fail, "two": prepare}
    works = [
        workers.Work(name, made, measure, (name,), cards)
        for cards, (name, made) in enumerate(kinds.items(), 1)
    ]
    # The processes start before the clock does: on a busy machine that takes long.
    started = {work.name: workers._process(work) for work in works if work.name != "bad"}
    started["bad"] = ThreadPoolExecutor(1)  # an error is one wherever it is raised
    for future in [process.submit(prepare, "it") for process in started.values()]:
        future.result()
    monkeypatch.setattr(workers, "_process", lambda work: started[work.name])
    began = time.time()
    kept = []
    found = workers.run_all(works, seconds=10, each=lambda found: kept.append(list(found)))
    assert time.time() - began < 60
    assert found["slow"] == {"reason": "not ready after 6 s"}
    assert found["bad"] == {"reason": "RuntimeError: no bad"}
    assert kept == [list(kinds)[:n] for n in (1, 2, 3, 4)]
    (*one, first), (*two, second) = found["one"], found["two"]
    assert (one, two) == (["one", "0"], ["two", "0,1,2,3"]) and first < second
    printed = capfd.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[1:]] == list(kinds)


def test_wrong_input_is_raised():
    with pytest.raises(InputError, match="x is wrong"):
        workers.run_all([workers.Work("x", refuse, measure, ("x",), 1)], here=True)


def test_a_process_that_died_before_its_turn_leaves_the_others_their_measures():
    mortal = []

    def wait_and_measure():
        """Until the other process is known to be dead."""
        with contextlib.suppress(BrokenExecutor):
            while True:
                mortal[0].submit(int).result()
        return "measured"

    def process_of(work):
        mortal.append(pool(work))
        return mortal[0]

    with pytest.MonkeyPatch.context() as patch:
        pool = workers._process
        of_work = lambda work: process_of(work) if work.cards > 1 else ThreadPoolExecutor(1)
        patch.setattr(workers, "_process", of_work)
        first = workers.Work("first", lambda: None, wait_and_measure, (), 1)
        dies = workers.Work("dies", prepare_to_die, measure, ("dies",), 2)
        last = workers.Work("last", lambda: None, lambda: "too", (), 1)
        found = workers.run_all([first, dies, last])
    assert found["first"] == "measured" and found["last"] == "too"
    assert found["dies"]["reason"].startswith("BrokenProcessPool: ")


def test_a_process_that_has_not_started_in_time_does_nothing_later():
    began = time.time()
    found = workers.run_all([workers.Work("slow", sleep, measure, ("slow",), 1)], seconds=0.01)
    assert found == {"slow": {"reason": "not ready after 0 s"}}
    assert time.time() - began < 60
