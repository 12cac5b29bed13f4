"""Tokens spread over devices: the recurrences compute what one device computes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels import context_parallel
from tests.kernels.accuracy import TOLERANCE


@pytest.fixture(scope="module")
def found():
    """Case -> errors by name of the array, of four simulated devices."""
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.context_parallel_cases"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_four_devices_equal_the_definition(found, op):
    """Outputs, final state and every gradient, within the tolerance of one device."""
    of_op = {case: errors for case, errors in found.items() if case.startswith(op)}
    assert len(of_op) >= 6
    for case, errors in of_op.items():
        limit = TOLERANCE[case.split()[1]]
        wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limit}
        assert not wrong, f"{case}: beyond {limit:.0e}: {wrong}"


@pytest.mark.parametrize("length", [1, 63, 65, 4100])
def test_sums_of_later_tokens_and_their_gradient(length):
    x, weight = np.random.default_rng(0).random((2, 2, length, 3), np.float32)
    sums, pull_back = jax.vjp(context_parallel._sums_after, jnp.asarray(x))
    later = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1] - x
    np.testing.assert_allclose(sums, later, rtol=1e-5, atol=1e-5)
    before = np.cumsum(weight.astype(np.float64), axis=1) - weight
    np.testing.assert_allclose(pull_back(jnp.asarray(weight))[0], before, rtol=1e-5, atol=1e-5)


def test_a_gpu_sums_later_tokens_by_products_alone():
    x = jax.ShapeDtypeStruct((1, 4096, 3), jnp.float32)
    sums = lambda x: jnp.sum(context_parallel._sums_after(x) ** 2)
    lowered = jax.jit(jax.grad(sums)).trace(x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "dot_general" in text and "reduce_window" not in text and "chlo.scan" not in text
