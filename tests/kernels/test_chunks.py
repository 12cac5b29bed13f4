"""How the tokens of both recurrences are cut into groups of chunks."""

import itertools

import jax.numpy as jnp
import pytest

from gt_jax.kernels.cases import LENGTHS
from gt_jax.kernels.chunks import make_plan


@pytest.mark.parametrize("length", LENGTHS)
def test_how_a_length_is_cut_does_not_depend_on_the_dtype(length):
    for batch, cpu_tokens in itertools.product((1, 4), (64, 4096)):
        plans = set()
        for dtype in ("float64", "float32", "bfloat16"):
            wide = jnp.promote_types(dtype, jnp.float32)
            options = {"batch": batch, "cpu_tokens": cpu_tokens}
            plan = make_plan(length, 64, dtype, "default", wide, **options)
            plans.add((plan.length, plan.groups, plan.chunks, plan.steps, plan.rows))
        assert len(plans) == 1
        assert plan.groups * plan.chunks * plan.steps >= length
