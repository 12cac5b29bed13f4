"""Muon and AdamW are compared at the best rate of each, paired by seed, on the same batches."""

import pytest

from experiments.lab import results
from experiments.questions import optimizers


def test_comparison_runs(tmp_path, monkeypatch, toys):
    text, out = tmp_path / "text.txt", tmp_path / "optimizers.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    monkeypatch.setattr(optimizers, "FAMILIES", ("GF-MH",))  # to be quick
    monkeypatch.setattr(optimizers, "RATES", (1e-3, 4e-3))
    optimizers.main(["--quick", "--seeds=2", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    measures, (table, *differences) = result["measures"], result["tables"]
    pairs = [(family, name) for family in optimizers.FAMILIES for name in ("AdamW", "Muon")]
    assert [tuple(row[:2]) for row in table["rows"]] == pairs
    losses = {pair: measures[f"loss {pair[0]}, {pair[1]}"]["values"] for pair in pairs}
    assert losses["GF-MH", "AdamW"] != losses["GF-MH", "Muon"]
    for family, name in pairs:
        assert measures[f"best rate {family}, {name}"] in optimizers.RATES
        pair = measures[f"AdamW - Muon, {family}, Muon beside AdamW"]
        expected = [a - b for a, b in zip(losses[family, "AdamW"], losses[family, "Muon"])]
        assert pair["mean"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert [len(t["rows"]) for t in differences] == [1, 0, 0]  # of one family there are no pairs
    assert "R/M gradient ratio GF-MH, Muon" in measures
