"""Works in processes of their own are measured in turn, whatever becomes of the others."""

import time

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


def test_works_are_measured_in_turn_in_processes_that_see_their_cards(capfd):
    kinds = {"one": prepare, "slow": sleep, "bad": fail, "two": prepare}
    works = [
        workers.Work(name, made, measure, (name,), cards)
        for cards, (name, made) in enumerate(kinds.items(), 1)
    ]
    began = time.time()
    found = workers.run_all(works, seconds=20)
    assert time.time() - began < 40
    assert found["slow"] == {"reason": "not ready after 12 s"}
    assert found["bad"] == {"reason": "RuntimeError: no bad"}
    (*one, first), (*two, second) = found["one"], found["two"]
    assert (one, two) == (["one", "0"], ["two", "0,1,2,3"]) and first < second
    printed = capfd.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[1:]] == list(kinds)


def test_wrong_input_is_raised():
    with pytest.raises(InputError, match="x is wrong"):
        workers.run_all([workers.Work("x", refuse, measure, ("x",), 1)], here=True)
