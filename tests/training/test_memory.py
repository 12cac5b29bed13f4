import pytest

from gt_jax.errors import InputError
from gt_jax.training import memory


def test_model_that_cannot_fit_is_refused_with_its_fields_and_sizes(monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda: (16 * 10**9, "a toy"))
    memory.check_fits(10**9, "model.dim=8")
    message = r"model\.dim=9 makes 1,100,000,000 parameters, which need 18 GB .* a toy has 16 GB"
    with pytest.raises(InputError, match=message):
        memory.check_fits(11 * 10**8, "model.dim=9")


def test_memory_of_this_machine_is_known():
    have, where = memory._memory()
    assert have > 10**8 and where
