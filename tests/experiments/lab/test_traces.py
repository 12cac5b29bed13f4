"""Shares of a trace are those of its intervals."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.lab import traces


def test_exposed_is_what_no_other_kernel_covers():
    one = [
        ("fusion_1", 0, 40),
        ("ncclDevKernel_AllGather_RING_LL(ncclArgs)", 30, 60),  # 20 of it alone
        ("ncclDevKernel_AllGather_RING_LL(ncclArgs)", 70, 80),  # all of it, in two streams
        ("all_reduce_kernel", 75, 80),
        ("wkv6_forward", 60, 70),
        ("gemm", 80, 100),
    ]
    idle = [("gemm", 500, 520)]
    found = traces.collective_shares([one, idle])
    assert found["collective"] == pytest.approx((30 + 10) / 100 / 2)
    assert found["exposed"] == pytest.approx((20 + 10) / 100 / 2)
    assert found["ms"] == pytest.approx(
        {"ncclDevKernel_AllGather_RING_LL": 40e-6 / 2, "all_reduce_kernel": 5e-6 / 2}
    )


def test_devices_without_kernels_have_no_shares():
    assert traces.collective_shares([]) == {}
    if jax.default_backend() == "cpu":
        run = lambda: jax.block_until_ready(jax.numpy.ones(3) + 1)
        assert traces.kernels(run) == [] and traces.planes(run)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a host's trace holds besides")
def test_operations_of_a_cpu_are_those_of_the_program_each_once():
    """Neither Python nor a loop, which takes as long as what is in it."""
    halve = lambda x, _: (jnp.tanh(x @ x) / 2, None)
    program = jax.jit(lambda x: jax.lax.scan(halve, x, length=4)[0]).lower(jnp.ones((64, 64)))
    compiled = program.compile()
    instructions = dict(re.findall(r"%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", compiled.as_text()))
    assert "while" in instructions.values()
    result = jax.block_until_ready(compiled(jnp.ones((64, 64))))
    found = traces.operations(lambda: jax.block_until_ready(compiled(result)))
    assert found and {event.name for event in found} <= instructions.keys()
    assert "while" not in {instructions[event.name] for event in found}
