"""Each family trains at the rate that was best in a tenth of the steps."""

import numpy as np
import pytest

from experiments import lab
from experiments.lab import results
from experiments.questions import long_parity


def test_every_family_trains_in_full_at_the_rate_that_was_best_in_short(tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "long_parity.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    calls, train = [], lab.train
    best = dict(zip(["GF-MH", "GPT-2"], long_parity.RATES))

    def watched(arms, **options):
        rates = {name: arm.config.optim.lr for name, arm in arms.items()}
        calls.append((list(options["seeds"]), options.get("sweep") or rates))
        if options["seeds"] == [0]:  # which rate is best is known
            return {name: best[name] for name in arms}
        return train(arms, **options)

    monkeypatch.setattr(lab, "train", watched)
    monkeypatch.setattr(long_parity, "best_rate", lambda rate: rate)
    long_parity.main(["--quick", "--seeds=2", f"--source={text}", f"--out={out}"])
    assert calls == [([0], {"optim.lr": long_parity.RATES}), ([0, 1], best)]
    found = results.read(out)
    hybrid, gpt = (found["measures"][f"loss {name}"]["values"] for name in best)
    ratio = found["measures"]["loss ratio GF-MH / GPT-2"]["values"]
    assert ratio == pytest.approx(np.divide(hybrid, gpt), rel=1e-4)
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rows["GPT-2"][2] >= rows["GF-MH"][2]
    assert {name: row[4] for name, row in rows.items()} == best
