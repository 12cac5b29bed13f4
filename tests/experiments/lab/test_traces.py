"""Shares of a trace are those of its intervals."""

import jax
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
