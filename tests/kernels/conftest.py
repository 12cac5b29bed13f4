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
