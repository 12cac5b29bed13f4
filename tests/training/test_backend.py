"""What a process that trains asks of Python and of its devices."""

import sys
import threading

import jax
import pytest

from gt_jax.training import backend


@pytest.mark.parametrize("given, expected", [(0.005, backend._TURN), (1e-5, 1e-5)])
def test_turns_of_threads_are_short_and_never_longer_than_they_were(given, expected):
    before = sys.getswitchinterval()
    sys.setswitchinterval(given)
    try:
        backend.prepare()
        assert sys.getswitchinterval() == pytest.approx(expected, abs=1e-6)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("platform, begun", [("gpu", True), ("cpu", False)])
def test_memory_of_devices_is_taken_in_a_thread_except_on_a_cpu(platform, begun, monkeypatch):
    taken = threading.Event()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backend, "take_memory", taken.set)
    backend.prepare()
    assert taken.wait(10 if begun else 0.2) == begun


def test_a_process_that_ends_early_waits_for_its_devices(monkeypatch):
    """Python cuts off daemons wherever they are; in JAX's C++ that can abort the process."""
    begun, end, alone = threading.Event(), threading.Event(), []

    def take():
        alone.append(threading.current_thread().daemon)
        begun.set()
        end.wait(10)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend, "take_memory", take)
    backend.prepare()
    assert begun.wait(10) and alone == [False]
    end.set()


def test_every_device_of_the_process_gets_an_array(monkeypatch):
    found, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, device: found.append(device) or put(x, device))
    backend.take_memory()
    assert found == jax.local_devices()


def test_memory_that_cannot_be_taken_is_no_error_of_the_thread(monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "device_put", full)
    backend.take_memory()
