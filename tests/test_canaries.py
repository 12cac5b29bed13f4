"""The canaries' prompts, their scoring, and the program on a small model."""

import json
import re
import string

import jax
import numpy as np
import pytest

from gt_jax import canaries, checkpoint
from gt_jax.canaries import CANARIES, SUITES, __main__, make_items, texts
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from gt_jax.scoring import Score
from tests.models.small_models import lively_parameters, random_tokens, small_model

LETTERS = CharTokenizer(string.ascii_letters + " \n.,:;?!'-")
# Canary -> how many of the wrong endings stand in the prompt.
DECOYS = {"C1d": 1, "C2a": 1, "C3a": 1, "C3b": 1, "C3c": 1, "C5c": 1, "C6a": 1, "C6b": 1}


@pytest.fixture(scope="module")
def loaded():
    model = make_model(
        ModelConfig(LETTERS.vocab_size, "rwkv6", dim=32, layers=1, heads=2, tie_embeddings=False)
    )
    return model, lively_parameters(model, random_tokens(1, 1)), LETTERS


def words(text):
    return re.findall(r"[\w-]+", text)


@pytest.mark.parametrize("name", CANARIES)
def test_prompts_are_what_they_should_be(name):
    canary = CANARIES[name]
    items = make_items(name, 60, LETTERS)
    assert items == make_items(name, 60, LETTERS)
    assert items[:20] == make_items(name, 20, LETTERS)
    assert len({item.prompt for item in items}) > 40
    for item in items:
        endings = [item.right, *item.wrong]
        assert len(set(endings)) == 4 and all(e.startswith(" ") for e in endings)
        assert item.prompt == item.prompt.rstrip()
        LETTERS.encode(item.prompt + "".join(endings))
        if canary.said:  # One word each; only the decoys are in the prompt.
            decoys = [wrong for wrong in item.wrong if wrong.strip() in words(item.prompt)]
            assert len(decoys) == DECOYS.get(name, 0)
            read_off = name not in ("C2b", "C5a", "C5b", "C5c")
            assert (item.right.strip() in words(item.prompt)) == read_off


def test_facts_are_far_apart_in_tokens():
    for item in make_items("C2a", 3, LETTERS):
        assert 1900 < len(LETTERS.encode(item.prompt)) < 2500


def test_small_talk_and_filler_give_nothing_away():
    pools = (texts.WOMEN, texts.MEN, texts.TOWNS, texts.COLOURS, texts.PLACES, texts.ANIMALS)
    answers = {
        word for pool in (*pools, texts.DRINKS, texts.NUMBERS, texts.TRADES) for word in pool
    }
    talk = " ".join(line for pair in texts.SMALL_TALK for line in pair)
    rest = " ".join(texts._WHO + texts._DID + texts._WHERE)
    assert not answers & set(words(talk + " " + rest))


def test_suites_grow():
    sizes = {name: len(suite) for name, suite in SUITES.items()}
    assert sizes == {"tiny": 2, "minimal": 4, "standard": 11, "extended": 17}
    assert set(SUITES["minimal"]) < set(SUITES["standard"]) < set(SUITES["extended"])


@pytest.mark.parametrize(
    ("favourite", "score", "reason"),
    [(0, 100, None), (1, 0, "failed, C1 at 0 % is below 50 %"), (None, 0, "failed, C1 at 0 %")],
)
def test_score_is_the_share_of_right_choices(loaded, monkeypatch, favourite, score, reason):
    """A model that prefers the right ending, a wrong one, none."""
    log_p = lambda i: float(i % 4 == favourite) if favourite is not None else float("nan")
    answer = lambda *_, **__: [Score(np.array([log_p(i)]), False) for i in range(40)]
    monkeypatch.setattr(canaries, "score", answer)
    items = make_items("C1a", 10, LETTERS)
    spoken = [LETTERS.encode(item.right[1:] + ".") for item in items[:5]] + [[0]] * 5
    monkeypatch.setattr(canaries, "continue_greedily", lambda *_, **__: spoken)
    result = canaries.run(*loaded, suite="minimal", items=10)
    assert {row["score"] for row in result["canaries"].values()} == {score}
    assert result["canaries"]["C1a"]["said"] == 50 and result["canaries"]["C4a"]["said"] is None
    assert result["average"] == score and result["passed"] == (reason is None)
    assert (result["reason"] or "").startswith(reason or "")


def test_what_is_asked_grows_with_the_model():
    required = canaries.required_average
    assert [required("minimal", n) for n in (100_000, 6_000_000, 125_000_000)] == [85, 90, 90]
    assert [required("standard", n) for n in (3_500_000, 10_000_000, 2 * 10**9)] == [None, 80, 90]
    assert required("tiny", 125_000_000) is None


@pytest.mark.parametrize("kind", ["gru", "rwkv6"])
def test_state_of_a_lively_model_passes(kind):
    small = small_model(kind)
    checks = canaries.check_state(small.model, small.params)
    assert list(checks) == ["S0", "S1", "S2", "S3", "S4"]
    assert all(check["passed"] for check in checks.values()), checks


def test_state_that_nothing_moves_fails():
    small = small_model("rwkv6")
    still = jax.tree.map(np.zeros_like, small.params)
    checks = canaries.check_state(small.model, still)
    assert [name for name, check in checks.items() if not check["passed"]] == ["S1", "S2", "S4"]
    attention = small_model("gpt2")
    assert canaries.check_state(attention.model, attention.params) == {}


def test_program_prints_a_table_and_writes_json(loaded, tmp_path, capsys):
    model, params, _ = loaded
    checkpoint.save_model(tmp_path / "model", model.config, params, LETTERS)
    path = tmp_path / "result.json"
    arguments = [f"--checkpoint={tmp_path / 'model'}", f"--json={path}", "--items=4"]
    __main__.main(["canaries", "--suite=tiny", *arguments])
    printed, beside = capsys.readouterr()
    assert "canary 2 of 2: C1b3, after 3 sentences\n" in beside  # a suite can take minutes
    result = json.loads(path.read_text())
    assert list(result["canaries"]) == ["C1a", "C1b3"] and list(result["categories"]) == ["C1"]
    assert result["passed"] is False and result["reason"] in printed
    assert "S4    state" in printed and "C1b3  after 3 sentences" in printed
    with pytest.raises(InputError, match="--suite"):
        __main__.main(["canaries", "--suite=huge", *arguments])


def test_tokenizer_without_the_letters_is_told(loaded):
    model, params, _ = loaded
    few = CharTokenizer("abc")
    with pytest.raises(InputError, match="canaries' English cannot be written"):
        canaries.run(model, params, few, suite="tiny", items=4)
