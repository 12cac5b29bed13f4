"""The server as real clients use it: openai, lm-evaluation-harness, and plain HTTP."""

import functools
import json
import logging
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint, convert, harness
from gt_jax.generation import Request
from gt_jax.models import ModelConfig, make_model

pytest.importorskip("uvicorn", reason="serving needs uvicorn")
small_tokenizers = pytest.importorskip("tests.data.small_tokenizers")
from gt_jax.data.hugging_face import HuggingFaceTokenizer  # noqa: E402
from gt_jax.data.pretrained import SpecialIds  # noqa: E402
from tests.serving import Serving  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DIALOGUE = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat été"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Mamba-2 with a published tokenizer."""
    tokenizer = HuggingFaceTokenizer(
        small_tokenizers.byte_level().to_str(), SpecialIds(0, 0, 0), chat_template=TEMPLATE
    )
    config = ModelConfig(tokenizer.vocab_size, "mamba2", dim=32, layers=1, state_size=16)
    shapes = jax.eval_shape(
        make_model(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes["params"]
    )
    folder = tmp_path_factory.mktemp("serve") / "small"
    checkpoint.save_model(folder, config, params, tokenizer)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def serving(loaded):
    serving = Serving(*loaded, rows=4)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def openai_client(serving):
    openai = pytest.importorskip("openai", reason="a check with OpenAI's own client")
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{serving.port}/v1", api_key="none", max_retries=0
    )


def alone(serving, prompt, **settings):
    return serving.engine([Request(prompt, **settings)])[0]


def test_every_prompt_and_choice_is_what_it_is_alone(serving, loaded):
    tokenizer = loaded[2]
    prompts = ["the cat", "on the mat.", "été"]
    ask = {"prompt": prompts, "n": 3, "seed": 2**31 - 2, "max_tokens": 9}
    status, answer = serving.post(ask)
    assert status == 200 and [c["index"] for c in answer["choices"]] == list(range(9))
    seeds = (2**31 - 2, 2**31 - 1, -(2**31))
    expected = [
        alone(serving, tokenizer.encode(prompt), seed=seed, max_tokens=9, stop_ids=(0,))
        for prompt in prompts
        for seed in seeds
    ]
    assert [c["text"] for c in answer["choices"]] == [e.text for e in expected]
    drawn, read = (
        sum(len(e.tokens) for e in expected),
        sum(len(tokenizer.encode(p)) for p in prompts),
    )
    assert (answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens"]) == (drawn, read)
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    assert serving.post(ask | {"prompt": ids})[1]["choices"] == answer["choices"]

    best = serving.post({"prompt": "the cat", "seed": 5, "best_of": 4, "n": 2, "max_tokens": 9})[1]
    four = [alone(serving, ids[0], seed=5 + i, max_tokens=9, stop_ids=(0,)) for i in range(4)]
    mean = lambda c: np.mean(c.log_probabilities)
    assert [c["text"] for c in best["choices"]] == [
        c.text for c in sorted(four, key=mean, reverse=True)[:2]
    ]
    assert best["usage"]["completion_tokens"] == sum(len(c.tokens) for c in four)


def test_echo_and_logprobs_are_as_openai_lays_them_out(serving, loaded):
    model, params, tokenizer = loaded
    text = "the cat été 你好"
    ids = tokenizer.encode(text)
    ask = {"prompt": text, "echo": True, "logprobs": 3, "max_tokens": 6, "temperature": 0}
    [choice] = serving.post(ask)[1]["choices"]
    found = choice["logprobs"]
    drawn = alone(serving, ids, max_tokens=6, temperature=0, stop_ids=(0,))
    assert choice["text"] == text + drawn.text
    whole = np.array([*ids, *drawn.tokens])
    logits = jax.jit(model.apply)({"params": params}, whole[None, :-1]).logits[0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    expected = log_p[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose(found["token_logprobs"][1:], expected, atol=1e-4)
    for place, top in enumerate(found["top_logprobs"][1:]):
        assert max(top.values()) == pytest.approx(log_p[place].max(), abs=1e-4)
        assert found["token_logprobs"][place + 1] in top.values() and 3 <= len(top) <= 4
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    lengths = list(map(len, found["tokens"]))
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]

    [prompt_alone] = serving.post(ask | {"max_tokens": 0, "n": 1})[1]["choices"]
    n = len(ids)
    assert prompt_alone["text"] == text and prompt_alone["finish_reason"] == "length"
    assert prompt_alone["logprobs"] == {name: column[:n] for name, column in found.items()}
    [without] = serving.post(ask | {"logprobs": None})[1]["choices"]
    assert without["text"] == choice["text"] and without["logprobs"] is None


def test_openais_client_reads_completions(serving, openai_client):
    ask = functools.partial(openai_client.completions.create, model="x", seed=3, max_tokens=20)
    options = {"prompt": ["the cat", "on"], "n": 2, "logprobs": 2, "echo": True}
    answer = ask(**options, extra_headers={"X-Request-Id": "mine-1"})
    assert answer._request_id == "mine-1" and len(answer.choices) == 4
    texts, values = [""] * 4, [[] for _ in range(4)]
    *chunks, last = ask(**options, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        values[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in answer.choices] and last.usage == answer.usage
    assert values == [choice.logprobs.token_logprobs for choice in answer.choices]
    [model] = openai_client.models.list()
    assert model.id == "x" and openai_client.models.retrieve("x") == model


def test_openais_client_reads_chats(serving, openai_client, loaded):
    tokenizer = loaded[2]
    written = "<system>be kind\n<user>the cat été\n<assistant>"
    prompt = tokenizer.encode(written)
    ask = functools.partial(
        openai_client.chat.completions.create, model="x", messages=DIALOGUE, seed=3, n=2
    )
    answer = ask(max_tokens=20, logprobs=True, top_logprobs=2)
    assert answer.usage.prompt_tokens == len(prompt)
    for seed, choice in enumerate(answer.choices, start=3):
        expected = alone(serving, prompt, max_tokens=20, seed=seed, stop_ids=(0,))
        assert choice.message.content == expected.text and choice.message.role == "assistant"
        entries = choice.logprobs.content
        assert [e.logprob for e in entries] == expected.log_probabilities
        joined = b"".join(bytes(e.bytes) for e in entries)
        assert joined.decode(errors="replace") == expected.text
        for entry in entries:
            assert len(entry.top_logprobs) == 2
            assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    texts, roles = [""] * 2, []
    *chunks, last = ask(
        max_completion_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content
        roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in answer.choices]
    assert roles == ["assistant"] * 2 and last.usage == answer.usage
    parts = [{"type": "text", "text": "the cat"}, {"type": "text", "text": " été"}]
    in_parts = ask(max_tokens=20, messages=[DIALOGUE[0], {"role": "user", "content": parts}])
    assert in_parts.choices[0].message.content == texts[0]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages holds 0 messages; send 1 to 1024"),
        ({"messages": DIALOGUE * 600}, "messages", "messages holds 1200 messages"),
        (
            {"messages": [{"role": "user", "content": "t" * 2**17}]},
            "messages",
            "tokens must have at most 65536",
        ),
        ({"messages": ["hi"]}, "messages", "messages[0]='hi' must be an object"),
        ({"messages": [{"content": "a"}]}, "messages", "messages[0].role must be a string"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "content=3 must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "parts must be of type text",
        ),
        ({"messages": [{"role": "user", "tool_calls": [1]}]}, "messages", "holds 'tool_calls'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages", "surrogate"),
        ({"tools": [{}]}, "tools", "tools=[{}] is not supported here; leave it at []"),
        ({"response_format": {"type": "json"}}, "response_format", "is not supported here"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs=2 needs logprobs=true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "0 to 20"),
        ({"logprobs": 1}, "logprobs", "logprobs=1 must be true or false"),
        ({"n": 200}, "n", "n=200 must be a whole number, 1 to 128"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens=0 must be"),
        ({"prompt": "a"}, "prompt", "prompt is no field of a request here"),
    ],
)
def test_impossible_chat_is_refused(serving, fields, param, message):
    status, answer = serving.post({"messages": DIALOGUE} | fields, "/v1/chat/completions")
    error = answer["error"]
    assert status == 400 and message in error["message"] and len(error["message"]) < 300
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_harness_scores_and_writes_through_the_server_as_beside_it(serving, folder, tmp_path):
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("transformers", reason="the harness reads the tokenizer with it")
    convert.export_model(folder, tmp_path / "theirs", layout="mamba2-hf")
    remote = completions.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{serving.port}/v1/completions",
        model="x",
        tokenizer=str(tmp_path / "theirs"),
        tokenizer_backend="huggingface",
        batch_size=3,
    )
    adapter = harness.Adapter(folder)
    pairs = [("the cat", " sat"), ("the cat ", "sat on the mat"), ("", "the"), ("a" * 70, "b")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    ours, theirs = adapter.loglikelihood(requests), remote.loglikelihood(requests)
    for (mine, greedy), (through, also) in zip(ours, theirs, strict=True):
        assert through == pytest.approx(mine, abs=1e-4) and greedy == also
    settings = {"until": ["\n", "at"], "max_gen_toks": 12, "do_sample": False}
    writing = [SimpleNamespace(args=(text, settings)) for text in ("the cat", "on the", "été")]
    assert remote.generate_until(writing) == adapter.generate_until(writing)


def test_greedy_token_is_told_as_greedy(serving, loaded):
    """The harness asks whether a token's number is the largest of those beside it."""
    ids = loaded[2].encode("the cat")
    token = alone(serving, ids, max_tokens=1, temperature=0).tokens[0]
    ask = {"prompt": [*ids.tolist(), token], "echo": True, "logprobs": 1, "max_tokens": 1}
    found = serving.post(ask)[1]["choices"][0]["logprobs"]
    assert found["token_logprobs"][-2] == max(found["top_logprobs"][-2].values())


@pytest.fixture(scope="module")
def locked(serving, loaded):
    """The same behind a key."""
    locked = Serving(*loaded, rows=4, api_key="s3cret")
    yield locked
    locked.stop()


def test_key_is_wanted_everywhere_but_for_health(locked, caplog):
    caplog.set_level(logging.INFO, "gt_jax.server")
    body = {"prompt": "the", "max_tokens": 1}
    for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/no")):
            status, answer, headers = locked.send(method, path, body, **wrong)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert headers["WWW-Authenticate"] == "Bearer"
    assert locked.send("GET", "/health")[:2] == (200, {"status": "ok"})
    right = {"Authorization": "Bearer s3cret"}
    assert locked.post(body, **right)[0] == 200
    assert locked.send("GET", "/v1/models/y", **right)[1]["error"]["code"] == 404
    assert "s3cre" not in caplog.text


def test_requests_have_ids_in_answers_and_in_the_log(serving, caplog):
    caplog.set_level(logging.INFO, "gt_jax.server")
    body = {"prompt": "the", "max_tokens": 1, "temperature": 0}
    own = serving.send("POST", "/v1/completions", body)[2]["X-Request-Id"]
    kept = serving.send("POST", "/v1/completions", body, **{"X-Request-Id": "a.b:c-1"})[2]
    odd = serving.send("GET", "/health", **{"X-Request-Id": "a b"})[2]["X-Request-Id"]
    failed = serving.send("POST", "/v1/completions", {"n": 0})[2]["X-Request-Id"]
    assert own.startswith("req-") and kept["X-Request-Id"] == "a.b:c-1" and odd.startswith("req-")
    lines = [record.getMessage() for record in caplog.records]
    told = lambda name: next(line for line in lines if line.startswith(name))
    assert " POST /v1/completions 200 " in told(own) and "1 tokens read, 1 drawn" in told(own)
    assert " 400 " in told(failed) and math.isfinite(float(told(failed).split()[4]))
    json.dumps(lines)
