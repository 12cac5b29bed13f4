"""The benchmark of generation runs anywhere, gives numbers, and says why where it has none."""

import dataclasses
import json

import pytest

from experiments.benchmarks import generation


def test_quick_benchmark_gives_numbers_or_the_reason(tmp_path, capsys, monkeypatch):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    make_config = generation.make_config
    one_block = lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, layers=1))
    monkeypatch.setattr(generation, "make_config", lambda quick: one_block(make_config(quick)))
    out = tmp_path / "generation.json"
    generation.main(["--quick", "--peers", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "of floor" in printed and "ImportError: no torch here" in printed
    results = json.loads(out.read_text())
    *ours, peer = results["decode"]
    assert [row["batch"] for row in ours] == [1, 2]
    for row in ours:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["floor_ms"] > 0 and row["compile_seconds"] > 0
    assert "no torch here" in peer["reason"]
    assert results["context"]["lengths"] == [128, 512] and min(results["context"]["ms"]) > 0
    assert results["prefill"]["prefill_seconds"] > 0 < results["prefill"]["forward_seconds"]


def test_peer_is_as_large_and_generates(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several of torch's wait for one another, busily
    rows = generation.run_peer(20_000_000, [2], {"peer_tokens": 3})
    assert len(rows) == 1 and rows[0]["tokens_per_second"] > 0, rows
    assert abs(rows[0]["parameters"] - 20_000_000) < 2_000_000  # half a block
