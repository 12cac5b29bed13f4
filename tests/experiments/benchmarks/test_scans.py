"""Times of scans are those of their kernels in a trace; where there are none, it is one line."""

import jax
import pytest

from experiments.benchmarks import scans
from experiments.lab import results
from gt_jax.errors import InputError
from gt_jax.kernels.pallas.devices import portable_unsupported


def test_times_are_of_the_kernels_in_a_trace(tmp_path, monkeypatch):
    events = [("gated_scan_forward_kernel", 0, 12_000), ("reduce", 0, 9_000)]
    events += [("memory_scan_backward", 1_000, 18_000), ("gated_scan_forward_kernel", 0, 14_000)]
    events += [("gated_scan_backward", 0, 20_000), ("memory_scan_forward", 0, 10_000)]
    calls = []

    def kernels(run):
        run()
        return [events]

    monkeypatch.setattr(scans, "portable_unsupported", lambda: None)
    monkeypatch.setattr(scans, "run_once", lambda name, *given: calls.append(name) or given)
    monkeypatch.setattr(scans.traces, "kernels", kernels)
    out = tmp_path / "scans.json"
    scans.main(["--quick", "--seeds=2", f"--out={out}"])
    measures = results.read(out)["measures"]
    assert measures["us minGRU, forward"]["values"] == [12, 14]
    assert measures["us minGRU, backward"]["values"] == [20]
    assert measures["us ParallelScan, forward"]["values"] == [10]
    assert measures["us ParallelScan, backward"]["values"] == [17]
    assert calls == ["minGRU"] * scans.SETS + ["ParallelScan"] * scans.SETS


@pytest.mark.parametrize(
    "name, direction, bytes_a_number",
    [
        ("minGRU", "forward", 6),
        ("minGRU", "backward", 10),
        ("ParallelScan", "forward", 8),
        ("ParallelScan", "backward", 16),
    ],
)
def test_bytes_are_those_the_kernels_state(name, direction, bytes_a_number):
    """gt_jax/kernels/README.md; what has no number a token and channel is little."""
    given = scans.inputs(name, 1, 4096, 64, jax.random.key(0))
    moved = scans.moved(name, direction, *given)
    assert 1 <= moved / (4096 * 64 * bytes_a_number) < 1.02


@pytest.mark.skipif(portable_unsupported() is None, reason="this GPU has the kernels")
def test_without_a_gpu_it_is_one_line():
    with pytest.raises(InputError, match="times kernels on a GPU"):
        scans.main(["--quick"])
