"""Scores and continuations against one plain call of the model."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gt_jax import scoring
from gt_jax.data import evaluation_batches
from gt_jax.errors import InputError
from gt_jax.scoring import check_ids, continue_greedily, score, windows
from gt_jax.training.evaluation import evaluate
from gt_jax.training.step import make_eval_step
from tests.models.small_models import random_tokens, small_model

LENGTHS = [30, 1, 17, 2, 9]


@pytest.fixture(params=["gru", "gpt2"])
def small(request):
    return small_model(request.param, layers=1)


def texts():
    return [np.asarray(random_tokens(1, n + 1, seed=n)[0]) for n in LENGTHS]


def plain_logits(small, ids):
    """[n, vocab] after each id, from one call with the rest of 40 columns behind them."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(ids)] = ids
    return small.apply({"params": small.params}, tokens).logits[0, : len(ids)]


def plain_log_probs(small, ids):
    """log p of ids[1:], [n]."""
    log_probs = np.asarray(jax.nn.log_softmax(plain_logits(small, ids[:-1])))
    return log_probs[np.arange(len(ids) - 1), ids[1:]]


def test_padding_and_chunks_change_no_score(small, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", 32)
    monkeypatch.setattr(scoring, "_SHORTEST", 8)
    pairs = [(ids[:1], ids[1:]) for ids in texts()]
    pairs.append((texts()[0][:20], texts()[0][20:]))
    scores = score(small.model, small.params, pairs, batch_size=4)
    for (context, continuation), found in zip(pairs, scores):
        want = plain_log_probs(small, np.concatenate([context, continuation]))
        np.testing.assert_allclose(found.log_probs, want[-len(continuation) :], atol=2e-5)


def test_continuation_is_what_the_parallel_form_finds_likeliest(small):
    prompts = [ids[:10] for ids in texts()]
    found = continue_greedily(small.model, small.params, prompts, max_tokens=20, batch_size=5)
    pairs = [(prompt, np.array(ids)) for prompt, ids in zip(prompts, found)]
    for prompt, ids in pairs:
        logits = plain_logits(small, np.concatenate([prompt, ids]))
        assert ids.tolist() == np.argmax(logits, -1)[len(prompt) - 1 : -1].tolist()
    assert all(s.greedy for s in score(small.model, small.params, pairs))
    pairs[0][1][-1] += 1
    assert not score(small.model, small.params, pairs)[0].greedy


def test_generation_ends_when_every_row_is_done():
    small = small_model("gru", layers=1)
    prompts = [ids[:1] for ids in texts()[:2]]
    done = lambda row, ids: len(ids) > scoring._DISPATCH * row
    found = continue_greedily(small.model, small.params, prompts, max_tokens=99, done=done)
    assert [len(ids) for ids in found] == [2 * scoring._DISPATCH] * 2


@pytest.mark.parametrize(("seq_len", "stride"), [(8, 8), (8, 3), (5, 1), (100, 50)])
def test_windows_count_every_target_once_with_enough_before_it(seq_len, stride):
    documents = [np.arange(n) + 1000 * n for n in (1, 2, 8, 9, 10, 33)]
    pairs = windows(documents, seq_len=seq_len, stride=stride)
    counted = np.concatenate([continuation for _, continuation in pairs])
    assert counted.tolist() == [i for ids in documents for i in ids[1:]]
    for context, continuation in pairs:
        whole = np.concatenate([context, continuation])
        assert np.all(np.diff(whole) == 1) and 2 <= len(whole) <= seq_len + 1
        if whole[0] % 1000:  # not the first of its document
            assert len(whole) == seq_len + 1 and len(context) > seq_len - stride


def test_disjoint_windows_give_the_loss_of_training():
    small = small_model("gru", layers=1)
    ids = np.asarray(random_tokens(1, 12 * 5 + 1)[0])
    scores = score(small.model, small.params, windows([ids], seq_len=12, stride=12))
    batches = evaluation_batches([ids], batch_size=2, seq_len=12)
    measured = evaluate(jax.jit(make_eval_step(small.model)), small.params, batches)
    loss = -np.concatenate([s.log_probs for s in scores]).mean()
    assert loss == pytest.approx(measured["validation_loss"], rel=1e-5)


def test_attention_models_see_their_last_positions():
    small = small_model("gpt2", layers=1)
    ids = np.asarray(random_tokens(1, 60)[0])
    found = score(small.model, small.params, [(ids[:50], ids[50:])])[0]
    np.testing.assert_allclose(found.log_probs, plain_log_probs(small, ids[-41:])[-10:], atol=2e-5)
    long = continue_greedily(small.model, small.params, [ids], max_tokens=5)
    assert long == continue_greedily(small.model, small.params, [ids[-35:]], max_tokens=5)
    with pytest.raises(InputError, match="41 tokens exceeds the 40 positions"):
        score(small.model, small.params, [(ids[:1], ids[1:42])])
    with pytest.raises(InputError, match="40 tokens to generate leave no room"):
        continue_greedily(small.model, small.params, [ids], max_tokens=40)


def test_no_texts_give_no_scores():
    small = small_model("gru", layers=1)
    assert score(small.model, small.params, []) == []
    assert continue_greedily(small.model, small.params, [], max_tokens=3) == []


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_id_outside_the_vocabulary_is_named(wrong):
    small = small_model("gru", layers=1)
    ids, size = np.array([1, wrong, 2]), small.model.config.vocab_size
    message = f"token id {wrong} is outside the model's vocabulary of {size} ids"
    with pytest.raises(InputError, match=message):
        score(small.model, small.params, [(ids[:1], ids[1:])])
    with pytest.raises(InputError, match=message):
        continue_greedily(small.model, small.params, [ids], max_tokens=3)


@pytest.mark.parametrize("wrong", [[1.5], [True], ["1"], [None]])
def test_ids_of_another_type_are_an_error(wrong):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10))
    with pytest.raises(InputError, match="token ids must be whole numbers, not "):
        check_ids(model, [np.array([1]), wrong])
    check_ids(model, [[], [0, 9]])


def test_padding_leaves_no_share_of_its_state():
    """Where documents do: a short text has the score that it has without a longer one beside it."""
    small = small_model("rwkv6", layers=1, rwkv_carry=0.9)
    text = np.asarray(random_tokens(1, 30)[0])
    pairs = [(text[:1], text[1:5]), (text[:1], text[1:])]
    beside, alone = (score(small.model, small.params, p)[0] for p in (pairs, pairs[:1]))
    np.testing.assert_allclose(beside.log_probs, alone.log_probs, atol=2e-4)
