"""Tokens spread over devices: the recurrences compute what one device computes."""

import json
import os
import subprocess
import sys

import pytest

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
