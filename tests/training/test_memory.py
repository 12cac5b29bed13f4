import functools

import jax
import pytest

from gt_jax.errors import InputError
from gt_jax.training.memory import check_fits
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state


@pytest.mark.parametrize("dtype, moments", [("float32", 8), ("bfloat16", 4)])
def test_run_that_cannot_fit_is_refused_with_sizes(toy, make_config, dtype, moments):
    """Four bytes a parameter, four of its gradient, and two moments; the count of updates."""
    config = make_config(**{"optim.moments_dtype": dtype})
    tx = make_optimizer(config.optim, make_schedule(config.optim, 20))
    state = jax.eval_shape(functools.partial(init_state, toy, tx, config), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    needed = count * (8 + moments) + 4
    assert check_fits(state, available=needed) == check_fits(state) == needed
    with pytest.raises(InputError, match=f"{count:,} parameters need .* GiB .*model.dim"):
        check_fits(state, available=needed - 1)
