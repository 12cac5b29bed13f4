import dataclasses
import functools
from collections import deque

import jax
import numpy as np
import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generation import Context, Request, complete, contexts, engine, prefill, stream
from gt_jax.generation.engine import run_queue
from gt_jax.generation.requests import Failure
from gt_jax.generation.slots import empty_slots, fill_slot, one_slot
from tests.models.small_models import random_tokens, small_model

LETTERS = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
TEXT = np.asarray(random_tokens(1, 200)[0])
LENGTHS = (1, 3, 64, 65, 130, 7)  # none, one or two whole chunks, and the edges


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


@pytest.mark.optimized
def test_company_changes_nothing_to_the_last_bit(gf):
    requests = mixed_requests()
    together = gf(requests)
    assert [len(c.tokens) for c in together] == [r.max_tokens for r in requests]
    for request, completion in zip(requests, together):
        assert gf([request]) == [completion]
    assert gf(requests[::-1]) == together[::-1]


def run_once(queue, rows=3, **options):
    """index -> its Deltas and Failures, and the order in which they came."""
    small, news, order = small_model("gf"), {}, []
    options = {"tokenizer": LETTERS, "rows": rows} | options
    for one in run_queue(small.model, small.params, deque(queue), **options):
        news.setdefault(one.index, []).append(one)
        order.append(one.index)
    return news, order


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.tokens]


def test_long_prompt_is_read_in_turns_with_decoding_and_to_the_same_bits(gf, monkeypatch):
    """As many tokens in a turn as the largest chunk, here 64."""
    long = Request(np.resize(TEXT, 64 * 6 + 5), max_tokens=4, seed=1)
    short = [Request(TEXT[:9], max_tokens=300, seed=seed) for seed in (2, 3)]
    alone = [gf([request], tokenizer=LETTERS)[0] for request in (long, *short)]
    monkeypatch.setattr(contexts, "PREFILL_CHUNKS", (64,))
    monkeypatch.setattr(engine, "TURN", 64)
    [by_64s] = gf([long], tokenizer=LETTERS)
    news, order = run_once(enumerate([long, *short]))
    assert order.index(0) >= 2 * 5  # five bursts of the short ones came first
    assert tokens_of(news[0]) == by_64s.tokens
    assert [tokens_of(news[i]) for i in (1, 2)] == [alone[i].tokens for i in (1, 2)]


def test_request_that_fails_ends_alone(gf, monkeypatch):
    """While its prompt is prepared, read, put into its slot, or its text decoded."""
    good = [Request(TEXT[:n], max_tokens=40, seed=n) for n in (3, 70, 5)]
    bad = Request(TEXT[:71], max_tokens=13, seed=4)
    expected = gf(good, tokenizer=LETTERS)
    for function in ("start_prefill", "prefill_chunk", "one_slot", "TextOut"):
        original = getattr(engine, function)

        def fail(*args, original=original):
            contexts = [a for a in args if isinstance(a, Context) and a.length == 71]
            if contexts or any(a is bad or a is bad.prompt for a in args):
                raise MemoryError("no room")
            return original(*args)

        if function == "TextOut":
            fail = failing_text(original, bad.prompt)
        with monkeypatch.context() as patch:
            patch.setattr(engine, function, fail)
            news, _ = run_once(enumerate([good[0], bad, *good[1:]]))
        assert isinstance(news[1][-1], Failure) and "no room" in str(news[1][-1].error), function
        assert [tokens_of(news[i]) for i in (0, 2, 3)] == [c.tokens for c in expected]


def failing_text(original, prompt):
    """A TextOut that fails at the first token after this prompt, whose last tokens it is given."""

    def make(tokenizer, before, stop):
        out = original(tokenizer, before, stop)
        if np.array_equal(before, prompt[-len(before) :]):
            out.add = lambda ids: (_ for _ in ()).throw(MemoryError("no room"))
        return out

    return make


def test_failure_of_the_shared_step_spares_those_who_wait(gf, monkeypatch):
    requests = [Request(TEXT[:4], max_tokens=40, seed=seed) for seed in range(4)]
    calls, original = [], engine.advance

    def fail_once(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the device is lost")
        return original(*args, **options)

    monkeypatch.setattr(engine, "advance", fail_once)
    news, _ = run_once(enumerate(requests))
    assert all(isinstance(news[i][0], Failure) for i in range(3))
    assert tokens_of(news[3]) == gf(requests[3:], tokenizer=LETTERS)[0].tokens
    calls.clear()
    with pytest.raises(RuntimeError, match="the device is lost"):
        gf(requests)


def test_request_that_nobody_wants_gives_up_its_slot():
    gone, seen = set(), []
    endless = Request(TEXT[:4], max_tokens=2**31 - 1)
    small = small_model("gf")
    queue = deque([(0, endless), (1, endless), (2, Request(TEXT[:4], max_tokens=3))])
    options = {"rows": 1, "wanted": lambda index: index not in gone}
    for delta in run_queue(small.model, small.params, queue, **options):
        seen.append(delta.index)
        gone |= {0, 1}
    assert seen == [0, 2]


def test_seed_decides_and_requests_can_share_what_was_read(gf):
    small = small_model("gf")
    context = prefill(small.model, small.params, TEXT[:100])
    requests = [Request(context, seed=seed, max_tokens=20) for seed in (1, 2, 1)]
    one, two, again = gf(requests)
    assert one == again and one.tokens != two.tokens
    assert gf([Request(TEXT[:100], seed=2, max_tokens=20)]) == [two]


def test_penalty_reaches_tokens_of_the_prompt_and_of_the_reply(gf):
    """Also those of the prompt that were read in chunks."""
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


def test_deltas_join_to_the_completion_and_come_after_each_burst(gf):
    small, deltas = small_model("gf"), []
    requests = mixed_requests()
    completions = gf(requests, tokenizer=LETTERS, on_delta=deltas.append)
    for index, completion in enumerate(completions):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.tokens] == completion.tokens
        assert "".join(delta.text for delta in mine) == completion.text
        assert completion.text == LETTERS.decode(completion.tokens)
        assert [delta.reason is None for delta in mine] == [True] * (len(mine) - 1) + [False]
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
        ({"temperature": -1.0}, "temperature=-1.0 must be a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature=nan must be a number from 0 to 100"),
        ({"temperature": float("inf")}, "temperature=inf must be a number from 0 to 100"),
        ({"temperature": 10**400}, "temperature=<a whole number of about 401 digits> must be"),
        ({"temperature": "1"}, "temperature='1' must be a number from 0 to 100"),
        ({"temperature": 1j}, "temperature=1j must be a number from 0 to 100"),
        ({"temperature": True}, "temperature=True must be a number from 0 to 100"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number above 0, at most 1"),
        ({"top_k": -2}, "top_k=-2 must be a whole number, 0 to 2147483647"),
        ({"top_k": 2**31}, "top_k=2147483648 must be a whole number, 0 to 2147483647"),
        ({"top_k": 1.0}, "top_k=1.0 must be a whole number, 0 to 2147483647"),
        ({"min_p": 1.1}, "min_p=1.1 must be a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be a number from 0.01 to 100"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e+39 must be a number from 0.01"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number, 1 to 2147483647"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be a whole number, 1 to 2147483647"),
        ({"max_tokens": None}, "max_tokens=None must be a whole number, 1 to 2147483647"),
        ({"max_tokens": 10**5000}, "max_tokens=<a whole number of about 5001 digits> must be"),
        ({"seed": 2**40}, "seed=1099511627776 must be a whole number, -2147483648 to 2147483647"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number, -2147483648 to 2147483647"),
        ({"stop": ("a", "")}, "stop=('a', '') must be strings, none empty"),
        ({"stop": "a"}, "stop='a' must be strings in a list or tuple"),
        ({"stop": (1,)}, "stop=(1,) must be strings in a list or tuple"),
        ({"stop": ("a" * 1025,)}, "stop of 1025 characters must have at most 1024"),
        ({"stop": ("ab\ud83d",)}, "stop holds '\\ud83d' at character 2, half of a surrogate pair"),
        ({"stop_ids": 3}, "stop_ids=3 must be a list of token ids"),
        ({"stop_ids": (1.5,)}, "stop_ids=1.5 must be a whole number, 0 to 2147483647"),
        ({"prompt": "abc"}, "prompt='abc' must be token ids; encode the text"),
        ({"prompt": [1, 2.5]}, "prompt holds 2.5, which is no token id"),
        ({"prompt": [1, 2**63]}, "prompt holds 9223372036854775808, which is no token id"),
        ({"prompt": [1, 2**63, -1]}, "prompt holds 9223372036854775808, which is no token id"),
        ({"prompt": np.array([1, 2**63], np.uint64)}, "prompt holds 9223372036854775808"),
        ({"prompt": [10**30]}, "prompt holds 1000000000000000000000000000000, which is no token"),
        ({"prompt": [[1], [2]]}, "prompt has 2 axes; give one list of token ids"),
        ({"prompt": [[1], [2, 3]]}, "prompt must be one list of token ids"),
    ],
)
def test_impossible_setting_is_refused(setting, message):
    with pytest.raises(InputError) as caught:
        Request(**({"prompt": TEXT} | setting))
    assert message in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.field == next(iter(setting))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompt is empty"),
        (Request([3, 17]), "prompt has the id 17; ids are 0 to 16"),
        (Request([-1]), "prompt has the id -1; ids are 0 to 16"),
        (Request(TEXT, stop=("a",)), "needs a tokenizer"),
        (Request(TEXT[:41], max_tokens=1), "prompt of 41 tokens exceeds the 40 positions"),
        (Request(TEXT[:7], max_tokens=35), "max_tokens=35 after a prompt of 7 .* 40 positions"),
    ],
)
def test_impossible_request_is_refused_before_anything_runs(request_, message):
    with pytest.raises(InputError, match=message):
        stream(small_model("gpt2").model, None, [Request(TEXT[:2], max_tokens=5), request_])


@pytest.mark.parametrize("rows", [0, 2.5, 10**9, None])
def test_impossible_number_of_rows_is_refused(rows):
    with pytest.raises(InputError, match=r"rows=.* must be a whole number, 1 to 65536"):
        stream(small_model("gf").model, None, [Request(TEXT)], rows=rows)


def test_numpy_numbers_are_numbers():
    request = Request(jax.numpy.array([1, 2]), max_tokens=np.int64(3), temperature=np.float32(0.5))
    assert (request.max_tokens, request.temperature) == (3, 0.5)
    for prompt in (np.array([1, 2], np.uint64), [np.uint64(1), 2]):
        np.testing.assert_array_equal(Request(prompt).prompt, [1, 2])
    assert type(request.max_tokens) is int and type(request.temperature) is float


def test_attention_model_uses_its_last_position():
    small = small_model("gpt2")
    [completion] = complete(small.model, small.params, [Request(TEXT[:7], max_tokens=34)], rows=1)
    assert np.isfinite(completion.log_probabilities).all()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_slot_draws_from_the_key_of_its_seed(seed):
    model, params, *_ = small_model("gf")
    request = Request([1, 2], seed=seed)
    slots = empty_slots(model, params, 2)
    slots = fill_slot(slots, 1, one_slot(request, prefill(model, params, request.prompt)))
    np.testing.assert_array_equal(
        jax.random.key_data(slots.key[1]), jax.random.key_data(jax.random.key(seed))
    )
