import functools

import jax
import pytest

from gt_jax.config import Optim
from gt_jax.errors import InputError
from gt_jax.training import memory
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state


def test_model_that_cannot_fit_is_refused_with_its_fields_and_sizes(monkeypatch):
    float32, bfloat16 = Optim(), Optim(moments_dtype="bfloat16")
    monkeypatch.setattr(memory, "_memory", lambda: (16 * 10**9, "a toy"))
    memory.check_fits(10**9, float32, "model.dim=8")
    message = r"model\.dim=9 makes 1,100,000,000 parameters, which need 18 GB .* a toy has 16 GB"
    with pytest.raises(InputError, match=message + ".*lower them, or set optim.moments_dtype="):
        memory.check_fits(11 * 10**8, float32, "model.dim=9")
    memory.check_fits(11 * 10**8, bfloat16, "model.dim=9")
    with pytest.raises(InputError, match=r"lower them$"):
        memory.check_fits(14 * 10**8, bfloat16, "model.dim=9")


def test_devices_that_cut_a_model_need_a_part_of_its_memory_each(monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda: (16 * 10**9, "a toy"))
    monkeypatch.setattr(memory, "_sharing", lambda: 1)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(InputError, match=r"need 64 GB .*; lower them, or raise parallel.fsdp=1$"):
        memory.check_fits(4 * 10**9, Optim(), "model.dim=8")
    with pytest.raises(InputError, match=r"need 32 GB .* on each device, .*raise parallel.fsdp=2$"):
        memory.check_fits(4 * 10**9, Optim(), "model.dim=8", devices=2)
    memory.check_fits(4 * 10**9, Optim(), "model.dim=8", devices=4)
    with pytest.raises(InputError, match=r"need 24 GB .* has 16 GB; lower them$"):
        memory.check_fits(12 * 10**9, Optim(), "model.dim=8", devices=8)
    monkeypatch.setattr(memory, "_sharing", lambda: 8)  # of one process on a CPU
    with pytest.raises(InputError, match="need 64 GB with their"):
        memory.check_fits(4 * 10**9, Optim(), "model.dim=8", devices=8)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moments_dtype": "bfloat16"},
        {"name": "schedule_free", "schedule": "constant"},
        {"ema": 0.9, "moments_dtype": "bfloat16"},
        {"name": "muon"},
    ],
)
def test_bytes_asked_for_are_those_of_a_state_and_its_gradients(toy, make_config, fields):
    config = make_config(**{f"optim.{name}": value for name, value in fields.items()})
    tx = make_optimizer(config.optim, make_schedule(config.optim, 20))
    state = jax.eval_shape(functools.partial(init_state, toy, tx, config), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    needed = size((state.params, state.params, state.opt_state, state.average))
    asked = memory._state_bytes(count, count, config.optim)
    if config.optim.name == "muon":  # of which it asks for the least: one moment of everything
        assert needed - size(state.params) < asked < needed
    else:
        assert 0 <= needed - asked < 64  # counts and the like


def test_memory_of_this_machine_is_known():
    have, where = memory._memory()
    assert have > 10**8 and where
