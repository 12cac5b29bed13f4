import fcntl
import os
import subprocess

import jax
import pytest

from gt_jax.kernels.pallas import devices


@pytest.fixture(autouse=True)
def _float64_available():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def float64_in_every_thread():
    """The interpreter's own threads among them."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


UNSUPPORTED = {"mosaic": devices.hopper_unsupported, "portable": devices.portable_unsupported}


@pytest.fixture
def needs_gpu(request):
    """Skips where the kernels of the test's parameter `impl` do not run."""
    if reason := UNSUPPORTED[request.node.callspec.params["impl"]]():
        pytest.skip(reason)


def first_gpu():
    """The GPU that this process computes on, as nvidia-smi names it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def memory_of_gpu():
    """Bytes that the first GPU has, whatever this process may take of them."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id"]
    return int(subprocess.check_output([*ask, first_gpu()], text=True)) * 2**20


@pytest.fixture
def large_gpu(needs_gpu, tmp_path_factory):
    """Skips below 100 GB; of the tests that take most of a GPU, one runs on it at a time."""
    if memory_of_gpu() < 100e9:
        pytest.skip(f"needs 100 GB of GPU memory; this one has {memory_of_gpu() / 1e9:.0f} GB")
    with open(tmp_path_factory.getbasetemp().parent / f"large_gpu_{first_gpu()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
