"""Each gate's number against one got another way; a run that fails says so by its exit status."""

import jax
import numpy as np
import pytest

from experiments.lab import results
from experiments.questions import gates
from gt_jax.checkpoint import save_model
from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model

LETTERS = "abcdefghijklmnop "
SIZE = {"dim": 32, "layers": 1, "heads": 1, "state_size": 16, "fusion": "gf"}


def test_verdict_follows_the_band():
    gate = gates.Gate("G4", "", 1.0, (0.3, 3), (0.1, 10))
    values = {0.3: "pass", 3: "pass", 0.2: "warn", 10: "warn", 0.05: "fail", np.nan: "fail"}
    for value, verdict in (values | {None: "none"}).items():
        assert gate._replace(value=value).verdict == verdict
    assert gates.band(gate) == "pass 0.3 to 3, warn 0.1 to 10"


def test_counted_losses_are_those_of_a_table():
    """a b a b a c: pairs ab 2, ba 2, ac 1; held out a b c."""
    train, held_out = [np.array([0, 1, 0, 1, 0, 2])], [np.array([0, 1, 2])]
    p = np.array([4, 3, 2]) / 9  # single tokens, one added to each
    single, pairs = gates.counted(train, held_out, 3)
    assert single == pytest.approx(-np.log(p[[1, 2]]).mean())
    of_pairs = [(2 + p[1]) / (3 + 1), (0 + p[2]) / (2 + 1)]
    assert pairs == pytest.approx(-np.log(of_pairs).mean())
    # Summed over all tokens that may follow, the chances are one.
    after = [np.exp(-gates.counted(train, [np.array([0, b])], 3)[1]) for b in range(3)]
    assert sum(after) == pytest.approx(1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An untrained hybrid as a converted model, and a text for it."""
    folder = tmp_path_factory.mktemp("gates")
    tokenizer = tokenizer_from_dict({"kind": "char", "alphabet": LETTERS})
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **SIZE)
    params = jax.jit(make_model(config).init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    save_model(folder / "model", config, params["params"], tokenizer)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list(LETTERS), 20_000))
    (folder / "text.txt").write_text(text)
    return folder


def test_untrained_models_fail_the_baseline_alone(stored, monkeypatch, capsys):
    monkeypatch.setattr(gates, "STEPS", 20)
    monkeypatch.setattr(gates, "OVERFIT_STEPS", 200)
    monkeypatch.setattr(gates, "LENGTH", 16)
    model, out = str(stored / "model"), stored / "gates.json"
    flags = [f"--source={stored / 'text.txt'}", f"--out={out}"]
    assert gates.main(["--checkpoint", model, model, *flags]) == 1
    printed = capsys.readouterr().out
    result = results.read(out)
    assert result["settings"]["checkpoints"] == [model, model]
    (table,) = result["tables"]
    failed = {name for name, *_, verdict in table["rows"] if verdict == "fail"}
    assert failed - {"G4"} == {"naive baseline"}  # its RWKV still ends in zeros
    # Letters drawn at random: nothing beats their number.
    assert f"single tokens {np.log(len(LETTERS)):.2f}" in printed
    value = {name: value for name, _, value, *_ in table["rows"]}
    assert value["G0"]["mean"] < 1e-4 and value["G1"]["mean"] == 1
    assert value["G4"]["mean"] > 0 and value["overfit"]["mean"] < 0.5
    # Trained weights are the same, new ones are of two seeds.
    assert len(set(value["G4"]["values"])) == 1 and len(set(value["overfit"]["values"])) == 2
    assert result["measures"]["naive baseline: held-out loss, verdict"] == "fail"
    for name in value:
        assert name in printed


def test_wrong_input_is_one_line(stored, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        gates.main(["--checkpoint", str(stored / "model"), str(tmp_path)])
    with pytest.raises(InputError, match=r"--source is missing: .* is a converted model"):
        gates.main([f"--checkpoint={stored / 'model'}"])
    short = tmp_path / "short.txt"
    short.write_text("abcabc")
    with pytest.raises(InputError, match="must have 1281 tokens"):
        gates.main([f"--checkpoint={stored / 'model'}", f"--source={short}"])
