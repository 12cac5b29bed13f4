from types import SimpleNamespace

import jax
import pytest

from gt_jax.training import utilization


def device(kind, peak_bytes=None, process=0):
    stats = None if peak_bytes is None else {"peak_bytes_in_use": peak_bytes}
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_share_of_peak_counts_all_devices_and_memory_the_fullest_of_this_process():
    devices = [device("NVIDIA H200", 3 * 10**9), device("NVIDIA H200", 5 * 10**9)]
    devices.append(device("NVIDIA H200", 9 * 10**9, process=1))
    # 989e12 FLOP/s each; 3 % of three of them at 10 MFLOP a token.
    found = utilization.measure(0.03 * 3 * 989e12 / 1e7, 10**7, devices)
    assert found == {"peak_memory": 5 * 10**9, "share_of_peak": pytest.approx(0.03)}
    assert utilization.describe(found) == "  5.0 GB at most  3 % of peak"


def test_what_is_not_known_is_left_out():
    assert utilization.measure(1000.0, 10**7, jax.devices("cpu")) == {}
    assert utilization.measure(0.0, 1, [device("NVIDIA H200")]) == {}
    assert utilization.describe({"loss": 1.0}) == ""


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_device(kind, peak):
    assert utilization.peak_flops(kind) == peak
