"""What a fusion adds is its time over GF-MH's just before; what is wrong is one line."""

import pytest

from experiments.benchmarks import fusion_cost
from experiments.lab import results
from gt_jax.errors import InputError


class Ready:
    """A program whose stretches take the next of some milliseconds."""

    def __init__(self, *ms):
        self.ready, self.stretch = self, iter(ms).__next__

    def result(self):
        return {"parameters": 1, "MiB": 1.0, "compile s": 1.0}


def test_stretches_are_compared_with_the_one_before(tmp_path, monkeypatch):
    made = {"gf": Ready(10, 10, 20, 30, 10, 10), "gru": Ready(11, 30, 12), "hy": Ready(20, 45, 5)}
    monkeypatch.setattr(
        fusion_cost, "Program", lambda stack, fields, quick: made[fields["model.fusion"]]
    )
    out = tmp_path / "cost.json"
    fusion_cost.main(["--only=gru,hy", "--seeds=3", "--at_once=2", f"--out={out}"])
    measures = results.read(out)["measures"]
    assert measures["added by gru"]["values"] == pytest.approx([0.1, 0.5, 0.2])
    assert measures["added by hy"]["values"] == pytest.approx([1, 0.5, -0.5])
    assert measures["ms a step GF-MH"]["mean"] == 10
    assert results.read(out)["settings"]["length"] == 2048


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("--only=gf", "must name a fusion besides gf"),
        ("--at_once=0", "--at_once=0 must be"),
        ("--width=100", "model.dim=100"),
        ("--only=lstm", "--only=lstm must be of hy"),
    ],
)
def test_wrong_flags_are_one_line(flag, reason):
    with pytest.raises(InputError, match=reason):
        fusion_cost.main([flag])
