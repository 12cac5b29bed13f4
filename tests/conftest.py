import atexit
import gc
import glob
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Threads of JAX's CPU backend, read when it starts. The warpgroups of an interpreted kernel wait
# for one another in threads of their own, and would wait forever if there were fewer.
os.environ.setdefault("NPROC", "8")

# Several test processes share a GPU: each takes of its memory what it needs, not three quarters,
# and gives it back. With XLA's own pools, a test of 2^31 numbers left 17 other processes without.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    # JAX computes on the first GPU it sees: each process begins with another one and sees all.
    _gpus = ",".join(str(n) for n in range(len(glob.glob("/dev/nvidia[0-9]*"))))
    _gpus = os.environ.get("CUDA_VISIBLE_DEVICES", _gpus).split(",")
    _first = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_gpus)
    if len(_gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_gpus[_first:] + _gpus[:_first])

# All processes of a session, those that tests start included, share what XLA compiled, and leave
# nothing in the user's cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="gt_jax-tests-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Tests compile much and run it once: XLA's CPU compiler leaves out most optimizations, in the
# processes that tests start too, and needs half of the time; on JAX 0.10 its earlier code
# generator needs a sixth, and a sixth less where it does not split its work for threads: other
# tests have the cores. Tests whose results optimizations can change need those.
AS_FOR_USERS = "JAX_DISABLE_MOST_OPTIMIZATIONS=false python -m pytest -m optimized"
_quick = False
if not Path("/dev/nvidiactl").exists():
    _quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true") == "true"
    _flags = os.environ.get("XLA_FLAGS", "")
    if _quick and version("jaxlib").startswith("0.10.") and "fusion_emitters" not in _flags:
        _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = _flags


# Tracing makes objects by the million and few cycles: to look for those among all that a session
# holds, again and again, takes a tenth of its time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def leaves_compiling_quick():
    """A test that turned XLA's optimizations on for all tests behind it doubled their time."""
    yield
    if _quick and "jax" in sys.modules:
        assert sys.modules["jax"].config.values["jax_disable_most_optimizations"]


@pytest.fixture
def no_curve(monkeypatch):
    """Runs in this process draw none at their end, half of the time of a small one."""
    from gt_jax import train

    monkeypatch.setattr(train, "curve_of", lambda job: None)


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay


def pytest_collection_modifyitems(items):
    if _quick:
        for item in items:
            if item.get_closest_marker("optimized"):
                item.add_marker(pytest.mark.skip(reason=f"compiled as for users: {AS_FOR_USERS}"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Each process works through neighbouring tests, which share fixtures and compiled programs."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="End runs badly in every way (50 kills, every signal in every phase), not in a few.",
    )
