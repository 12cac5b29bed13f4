import ctypes
import json
import os
import subprocess
import sys

import pytest

from gt_jax import heap

ROOT = os.path.dirname(os.path.dirname(__file__))

# Blocks of 200 MB from two threads, as XLA's; says pages taken by the second round, and what is
# resident before and after small blocks end up in a hole.
PROGRAM = """
import ctypes, json, resource, threading, time
from gt_jax import heap
heap.prepare()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 200 * 2**20
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block
def round_():
    threads = [threading.Thread(target=lambda: libc.free(use())) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
round_()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
round_()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
block, above = use(), libc.malloc(2**20)
libc.free(block)
small = libc.malloc(2**20)  # in the hole: the next block does not fit
block = use()
time.sleep(4 * heap._SECONDS)
print(json.dumps({"faults": faults, "blocks": resident() / size}))
"""


def run(**environment):
    """What PROGRAM says with these variables set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    environment = kept | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
PAGES = 2 * 200 * 2**20 // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def test_threads_get_freed_memory_again_and_holes_are_returned():
    said = run()
    assert said["faults"] < PAGES / 50
    assert said["blocks"] < 1.75  # one block is used, and the hole before it is as large


@pytest.mark.parametrize(
    "environment", [{"JAX_PLATFORMS": "cuda"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}]
)
def test_heap_of_a_gpus_program_or_a_tuned_one_is_left_alone(environment):
    assert run(**environment)["faults"] > PAGES / 2


def test_environment_that_only_checks_is_not_one_that_tunes():
    assert not heap._tuned({"MALLOC_PERTURB_": "85", "GLIBC_TUNABLES": "glibc.rtld.nns=4"})
    assert heap._tuned({"GLIBC_TUNABLES": "glibc.rtld.nns=4:glibc.malloc.arena_max=2"})
    assert heap._tuned({"MALLOC_ARENA_MAX": "2"})


def test_another_allocator_is_left_alone(monkeypatch):
    class Jemalloc:
        malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(lambda _: 0)

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: real(name) if name else Jemalloc())
    assert heap._glibc() is None
