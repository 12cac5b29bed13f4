"""What 8, 64 and 256 devices hold and exchange in a step, of programs that are compiled only."""

import json
import os
import subprocess
import sys

import pytest

# Mesh -> of a model of two blocks: gathers written, and other collectives compiled.
# fsdp cuts 19 matrices, 9 a block and the embedding; blocks gather theirs once more for the
# backward pass. Of devices that share tokens, a block's recurrences gather two arrays each (and
# scatter two gradients), and its convolution and token shift pass inputs on and gradients back.
EXPECTED = {
    '{"batch": 8}': (0, {"all-reduce": 3}),
    '{"batch": 8, "fsdp": 8}': (19 + 18, {"all-reduce": 5, "reduce-scatter": 19}),
    '{"batch": 8, "fsdp": 8, "sequence": 4}': (
        19 + 18 + 8,
        {"all-reduce": 5, "reduce-scatter": 19 + 8, "collective-permute": 8},
    ),
}


@pytest.fixture(scope="module")
def found():
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "256",
        "JAX_PLATFORMS": "cpu",
    }
    meshes = f"[{', '.join(EXPECTED)}]"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.many_devices", meshes],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(EXPECTED, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_bytes_on_a_device_fall_with_fsdp_alone(found):
    whole, *cut = found.values()
    for one in cut:
        assert one["parameters"] == cut[0]["parameters"]
        # Vectors and low-rank factors are copied: a quarter of all at this width.
        assert one["parameters"] == one["moments"] < 0.36 * whole["parameters"]


@pytest.mark.parametrize("mesh", EXPECTED)
def test_collectives_of_a_step_are_those_of_the_table(found, mesh):
    gathers, compiled = EXPECTED[mesh]
    assert found[mesh]["gathers"] == gathers
    # Of gathers, XLA for CPUs joins the second with the first in JAX 0.10, but not in 0.12.
    assert {n: x for n, x in found[mesh]["compiled"].items() if n != "all-gather"} == compiled
