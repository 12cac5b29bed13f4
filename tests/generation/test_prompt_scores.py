"""Log-probabilities of a prompt and the likeliest tokens, against one plain call of the model."""

import jax
import numpy as np
import pytest

from gt_jax.errors import InputError
from gt_jax.generation import Request, complete, prefill
from tests.models.small_models import random_tokens, small_model

TEXT = np.asarray(random_tokens(1, 400)[0])


@pytest.fixture(scope="module")
def small():
    return small_model("mamba2", layers=1)


def draw(small, requests):
    return complete(small.model, small.params, requests, rows=2)


def test_scores_are_those_of_one_plain_call(small):
    lengths = (1, 2, 70, 390)
    ask = {"max_tokens": 3, "temperature": 0.0, "top_logprobs": 4, "prompt_logprobs": True}
    found = draw(small, [Request(TEXT[:n], **ask) for n in lengths])
    plain = draw(small, [Request(TEXT[:n], max_tokens=3, temperature=0.0) for n in lengths])
    log_p = jax.nn.log_softmax(small.apply({"params": small.params}, TEXT[None]).logits[0])
    log_p = np.asarray(log_p)
    for n, completion, alone in zip(lengths, found, plain):
        scores = completion.prompt
        assert len(scores.log_probabilities) == len(scores.top) == n - 1
        expected = log_p[np.arange(n - 1), TEXT[1:n]]
        np.testing.assert_allclose(scores.log_probabilities, expected, atol=1e-4)
        for place, top in enumerate(scores.top):
            values = np.sort(log_p[place])[::-1][:4]
            np.testing.assert_allclose(list(top.values()), values, atol=1e-4)
            np.testing.assert_allclose([log_p[place, i] for i in top], values, atol=1e-4)
        assert (completion.tokens, completion.log_probabilities) == alone[:2]
        assert alone.prompt is None and alone.top == []
        for token, value, top in zip(completion.tokens, alone.log_probabilities, completion.top):
            assert next(iter(top.items())) == (token, value) and len(top) == 4


def test_equal_prompts_at_once_are_read_once(small, monkeypatch):
    from gt_jax.generation import engine

    read, original = [], engine.prefill_chunk
    monkeypatch.setattr(engine, "prefill_chunk", lambda *a: read.append(1) or original(*a))
    requests = [Request(TEXT[:390], max_tokens=3, seed=seed) for seed in (1, 2)]
    together = draw(small, requests)
    chunks = len(read)
    assert [draw(small, [request])[0] for request in requests] == together
    assert len(read) == 3 * chunks


def test_context_has_no_scores(small):
    context = prefill(small.model, small.params, TEXT)
    with pytest.raises(InputError, match="prompt_logprobs=True needs a prompt of ids"):
        draw(small, [Request(context, prompt_logprobs=True)])
    with pytest.raises(InputError, match="top_logprobs=21 must be a whole number, 0 to 20"):
        Request(TEXT, top_logprobs=21)
