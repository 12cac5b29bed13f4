import dataclasses
import functools

import jax
import numpy as np
import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generation import Request, complete, read, stream
from tests.models.small_models import random_tokens, small_model

LETTERS = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
TEXT = np.asarray(random_tokens(1, 200)[0])
LENGTHS = (1, 3, 64, 65, 130, 7)  # none, one or two whole pieces, and the edges


@pytest.fixture(scope="module")
def gf():
    small = small_model("gf")
    return functools.partial(complete, small.model, small.params, rows=3)


def mixed_requests():
    """One of each kind of setting, on prompts of all lengths."""
    settings = [
        {"temperature": 0.0},
        {"seed": 1, "max_tokens": 3},
        {"top_k": 4, "max_tokens": 50},
        {"top_p": 0.8, "temperature": 1.5},
        {"repetition_penalty": 1.5},
        {"min_p": 0.1, "max_tokens": 1},
    ]
    return [
        Request(TEXT[:length], **({"max_tokens": 40, "seed": 7} | more))
        for length, more in zip(LENGTHS, settings)
    ]


@pytest.mark.parametrize("kind", ["gf", "gru", "rwkv+rwkv", "legacy-b2", "mamba2", "gpt2"])
def test_greedy_tokens_are_what_reading_the_whole_text_again_finds_likeliest(kind):
    small = small_model(kind, max_positions=200)
    requests = [Request(TEXT[:n], max_tokens=40, temperature=0.0) for n in (1, 7, 70)]
    with jax.default_matmul_precision("float32"):  # where a GPU would round to TF32
        completions = complete(small.model, small.params, requests, rows=2)
        for request, completion in zip(requests, completions):
            length = len(request.prompt)
            whole = np.zeros((1, 110), np.int32)  # one shape; what follows has no influence
            whole[0, : length + 40] = [*request.prompt, *completion.tokens]
            logits = small.apply({"params": small.params}, whole).logits[0]
            logits = logits[length - 1 : length + 39]
            assert completion.tokens == np.argmax(logits, -1).tolist()
            expected = jax.nn.log_softmax(logits)[np.arange(40), np.array(completion.tokens)]
            np.testing.assert_allclose(completion.log_probabilities, expected, atol=1e-4)
            assert completion.reason == "length"


def test_company_changes_nothing_to_the_last_bit(gf):
    requests = mixed_requests()
    together = gf(requests)
    assert [len(c.tokens) for c in together] == [r.max_tokens for r in requests]
    for request, completion in zip(requests, together):
        assert gf([request]) == [completion]
    assert gf(requests[::-1]) == together[::-1]


def test_seed_decides_and_requests_can_share_what_was_read(gf):
    small = small_model("gf")
    context = read(small.model, small.params, TEXT[:100])
    requests = [Request(context, seed=seed, max_tokens=20) for seed in (1, 2, 1)]
    one, two, again = gf(requests)
    assert one == again and one.tokens != two.tokens
    assert gf([Request(TEXT[:100], seed=2, max_tokens=20)]) == [two]


def test_penalty_reaches_tokens_of_the_prompt_and_of_the_reply(gf):
    """Also those of the prompt that were read in pieces."""
    prompt = TEXT[:70] // 3  # a third of the vocabulary
    request = Request(prompt, max_tokens=30, temperature=0.0, repetition_penalty=1.4)
    plain = dataclasses.replace(request, repetition_penalty=1.0)
    penalized, unpenalized = (c.tokens for c in gf([request, plain]))
    assert penalized != unpenalized
    whole = np.concatenate([prompt, penalized])
    small = small_model("gf")
    logits = np.array(small.apply({"params": small.params}, whole[None]).logits[0])
    for n, token in enumerate(penalized, start=70):
        after = logits[n - 1]
        seen = list(set(whole[:n].tolist()))
        after[seen] = [x / 1.4 if x > 0 else x * 1.4 for x in after[seen]]
        assert token == np.argmax(after)


def test_pieces_join_to_the_completion_and_come_in_bursts(gf):
    small, pieces = small_model("gf"), []
    requests = mixed_requests()
    completions = gf(requests, tokenizer=LETTERS, on_piece=pieces.append)
    for index, completion in enumerate(completions):
        mine = [piece for piece in pieces if piece.index == index]
        assert [token for piece in mine for token in piece.tokens] == completion.tokens
        assert "".join(piece.text for piece in mine) == completion.text
        assert completion.text == LETTERS.decode(completion.tokens)
        assert [piece.reason is None for piece in mine] == [True] * (len(mine) - 1) + [False]
    first = next(stream(small.model, small.params, requests[:1], rows=3))
    assert 0 < len(first.tokens) < 40


def test_stop_string_and_stop_id_end_a_request_early_and_only_it(gf):
    whole, other = gf(
        [Request(TEXT[:9], max_tokens=60, seed=seed) for seed in (1, 2)], tokenizer=LETTERS
    )
    stop = whole.text[40:43]
    end = whole.text.find(stop)
    requests = [
        Request(TEXT[:9], max_tokens=60, seed=1, stop=(stop,)),
        Request(TEXT[:9], max_tokens=60, seed=2),
        Request(TEXT[:9], max_tokens=60, seed=1, stop_ids=(whole.tokens[30],)),
    ]
    by_string, unstopped, by_id = gf(requests, tokenizer=LETTERS)
    assert (by_string.text, by_string.reason) == (whole.text[:end], "stop")
    assert by_string.tokens == whole.tokens[: end + 3]
    assert by_string.log_probabilities == whole.log_probabilities[: end + 3]
    assert unstopped == other
    first = whole.tokens.index(whole.tokens[30])
    assert (by_id.tokens, by_id.reason) == (whole.tokens[:first], "stop")
    assert by_id.text == whole.text[:first]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0, at most 1"),
        ({"top_k": -2}, "top_k=-2 must be 0 or more"),
        ({"min_p": 1.1}, "min_p=1.1 must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"seed": 2**40}, "seed=1099511627776 must be a whole number of 32 bits"),
        ({"stop": ("a", "")}, "stop=('a', '') must be strings, none empty"),
        ({"stop": "a"}, "stop='a' must be strings, none empty"),
    ],
)
def test_impossible_setting_is_refused(setting, message):
    with pytest.raises(InputError) as caught:
        Request(TEXT, **setting)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompt is empty"),
        (Request(TEXT, stop=("a",)), "needs a tokenizer"),
        (Request(TEXT[:7], max_tokens=35), "max_tokens=35 after a prompt of 7 .* 40 positions"),
    ],
)
def test_impossible_request_is_refused_before_anything_runs(request_, message):
    with pytest.raises(InputError, match=message):
        stream(small_model("gpt2").model, None, [Request(TEXT[:2], max_tokens=5), request_])


def test_attention_model_uses_its_last_position():
    small = small_model("gpt2")
    [completion] = complete(small.model, small.params, [Request(TEXT[:7], max_tokens=34)], rows=1)
    assert np.isfinite(completion.log_probabilities).all()
