"""Which models take Pallas kernels."""

import pytest

from gt_jax.kernels.pallas import devices
from gt_jax.models import make_config
from gt_jax.training import model
from gt_jax.training.model import takes_kernels

pytestmark = pytest.mark.skipif(devices._too_old() is not None, reason="kernels need a newer JAX")


@pytest.mark.parametrize(
    "preset, impl, taken",
    [
        ("gf-mh", "auto", True),
        ("rwkv6", "portable", True),
        ("mamba2", "mosaic", True),
        ("gf-mh", "chunked", False),
        ("gf-mh", "reference", False),
        ("gpt2", "auto", False),
    ],
)
def test_models_with_recurrences_take_kernels_where_a_gpu_has_them(preset, impl, taken):
    config = make_config(preset, vocab_size=65, impl=impl)
    with devices.simulated("lower"):
        assert takes_kernels(config) == taken


@pytest.mark.parametrize("dtype, taken", [("bfloat16", True), ("float32", False)])
def test_portable_kernels_are_of_bfloat16(monkeypatch, dtype, taken):
    """As they say of themselves."""
    from gt_jax.kernels.ssd import portable as ssd
    from gt_jax.kernels.wkv6 import portable as wkv6

    assert all(kernels.TAKES.startswith("bfloat16,") for kernels in (wkv6, ssd))
    monkeypatch.setattr(model, "hopper_unsupported", lambda: "an A100")
    config = make_config("gf-mh", vocab_size=65, dtype=dtype)
    with devices.simulated("lower"):
        assert takes_kernels(config) == taken


def test_none_are_taken_where_they_do_not_run():
    if devices.portable_unsupported() is None:
        pytest.skip("the Pallas kernels run on this GPU")
    assert not takes_kernels(make_config("gf-mh", vocab_size=65))
