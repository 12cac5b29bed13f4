import jax
import pytest


@pytest.fixture(autouse=True)
def _float64_available():
    with jax.enable_x64(True):
        yield
