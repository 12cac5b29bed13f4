import jax
import pytest

from gt_jax.kernels import hopper


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


@pytest.fixture
def needs_hopper():
    if hopper.unsupported():
        pytest.skip(hopper.unsupported())
