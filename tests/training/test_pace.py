"""A part of the model warms up longer, waits, or has its gradients amplified; the rest does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.training import pace
from gt_jax.training.optimizer import make_schedule


def factors(make_config, updates, **fields):
    """By part, what its learning rate is multiplied by at each of some updates."""
    optim = make_config(**{f"optim.{name}": value for name, value in fields.items()}).optim
    rate = make_schedule(optim, 20)
    by_update = [pace.factors(optim, jnp.int32(n), rate(n)) for n in range(updates)]
    assert all(list(found) == pace.parts(optim) for found in by_update)
    return {part: [float(found[part]) for found in by_update] for part in by_update[0]}, rate


def test_a_part_that_waits_stays_as_it_is_and_then_moves_like_the_rest(make_config):
    found, _ = factors(make_config, 5, **{"frozen_steps.mamba": 3})
    assert found == {"mamba": [0, 0, 0, 1, 1]}


def test_a_part_warms_up_on_its_own_line_until_it_meets_the_schedule(make_config):
    found, rate = factors(make_config, 16, **{"part_warmup_steps.rwkv": 8, "warmup_steps": 2})
    rates = [float(rate(n)) * found["rwkv"][n] for n in range(16)]
    expected = [min(1e-3 * (n + 1) / 8, float(rate(n))) for n in range(16)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[0] == pytest.approx(1.25e-4) and rates[15] == pytest.approx(float(rate(15)))
    assert list(found) == ["rwkv"]


def test_nothing_is_held_back_or_scaled_unless_asked_for(make_config):
    optim = make_config().optim
    assert pace.parts(optim) == []
    groups = {"mamba": {"joined": jnp.ones(2)}, "rest": {"joined": jnp.ones(2)}}
    assert pace.scaled(groups, optim) is groups


def test_mambas_gradients_alone_are_scaled(make_config):
    optim = make_config(**{"optim.mamba_grad_scale": 10.0}).optim
    groups = {"mamba": {"joined": jnp.ones(2)}, "rest": {"joined": jnp.ones(2)}}
    scaled = pace.scaled(groups, optim)
    assert jax.tree.map(float, jax.tree.map(jnp.sum, scaled)) == {
        "mamba": {"joined": 20.0},
        "rest": {"joined": 2.0},
    }
