import os

import pytest

# Threads of JAX's CPU backend, read when it starts. The warpgroups of an interpreted kernel wait
# for one another in threads of their own, and would wait forever if there were fewer.
os.environ.setdefault("NPROC", "8")

# Tests leave nothing in the user's cache of compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# Several test processes share a GPU: each takes of its memory what it needs, not three quarters.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="End runs badly in every way (50 kills, every signal in every phase), not in a few.",
    )


@pytest.fixture(scope="module")
def compile_quickly():
    """Compile twice as fast, for tests of a module that run little of what they compile."""
    import jax  # after the environment is set

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compile_once(compile_quickly, tmp_path_factory):
    """Quickly, and every program once, for tests of a module that compile the same ones again."""
    import jax

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
