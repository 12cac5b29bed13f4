"""The HTTP endpoint against the engine, with the library's test client."""

import json
import threading
import time

import pytest

from gt_jax import server
from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generation import Request, Worker, complete, engine
from gt_jax.generation import worker as worker_module
from gt_jax.server import app as app_module
from gt_jax.server import completions
from tests.models.small_models import small_model
from tests.serving import none_left

pytest.importorskip("starlette.testclient", reason="serving needs starlette (and httpx to test it)")
from starlette.testclient import TestClient

LETTERS = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
ASK = {"prompt": "abcabc", "max_tokens": 40, "seed": 3}


@pytest.fixture(scope="module")
def gf():
    small = small_model("gf")
    return small.model, small.params


def client_of(gf, *, seconds=60, rows=3, worker=None):
    worker = worker or Worker(*gf, LETTERS, rows)
    app = server.make_app(worker, gf[0], name="small", max_tokens=10**8, seconds=seconds)
    client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)
    client.worker = worker
    return client


@pytest.fixture(scope="module")
def client(gf):
    return client_of(gf)


def expected(gf, **fields):
    request = Request(LETTERS.encode(ASK["prompt"]), **({"max_tokens": 40, "seed": 3} | fields))
    return complete(*gf, [request], tokenizer=LETTERS, rows=3)[0]


def ask(client, **fields):
    return client.post("/v1/completions", json=ASK | fields)


def test_answer_is_the_engines(client, gf):
    answer = ask(client).json()
    [choice] = answer["choices"]
    assert choice["text"] == expected(gf).text and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 40, "total_tokens": 46}
    assert answer["object"] == "text_completion" and answer["model"] == "small"
    assert ask(client, max_tokens=None).json()["usage"]["completion_tokens"] == 16


def test_settings_reach_the_engine(client, gf):
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.01}
    settings |= {"repetition_penalty": 1.2}
    text = ask(client, **settings).json()["choices"][0]["text"]
    assert text == expected(gf, **settings).text
    stopped = ask(client, **settings, stop=text[10:12]).json()["choices"][0]
    assert stopped == {
        "index": 0,
        "text": text[: text.find(text[10:12])],
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_stream_joins_to_the_answer(client, gf):
    lines = [line for line in ask(client, stream=True).text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected(gf).text
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"] and len(chunks) > 1
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_clients_at_once_get_what_they_would_alone(client, gf):
    texts = {}

    def one(seed):
        texts[seed] = ask(client, seed=seed).json()["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=[seed]) for seed in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {seed: expected(gf, seed=seed).text for seed in range(7)}
    none_left(client.worker)


@pytest.mark.parametrize(
    "preset, length, max_tokens, asked",
    [("gf", 6, 100, 16), ("gf", 6, 5, 5), ("gpt2", 6, 100, 16), ("gpt2", 30, 100, 11)],
)
def test_body_that_says_no_length_is_never_refused_for_it(preset, length, max_tokens, asked):
    body = json.dumps({"prompt": ["a", "a" * length]}).encode()
    model = small_model(preset).model  # gpt2 has 40 positions, and the last token needs none
    parsed = completions.parse(body, model, LETTERS, max_tokens)
    assert [request.max_tokens for request in parsed.requests] == [asked, asked]


def test_prompt_longer_than_the_model_reads_is_refused_as_such():
    body = json.dumps({"prompt": "a" * 41}).encode()
    with pytest.raises(InputError, match="prompt of 41 tokens must have at most 40"):
        completions.parse(body, small_model("gpt2").model, LETTERS, 5)


def test_equal_prompts_without_a_seed_get_texts_of_their_own(client):
    several = {"prompt": ["abc"] * 4, "n": 2, "max_tokens": 12}
    texts = [choice["text"] for choice in ask(client, **several, seed=None).json()["choices"]]
    assert len(set(texts)) == 8
    texts = [choice["text"] for choice in ask(client, **several, seed=3).json()["choices"]]
    assert texts == texts[:2] * 4  # as each of these prompts alone with this seed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": ["a"] * 129}, "prompt holds 129 prompts; send at most 128"),
        ({"prompt": [3, 17]}, "prompt has the id 17; ids are 0 to 16"),
        ({"prompt": [-1]}, "prompt has the id -1; ids are 0 to 16"),
        ({"prompt": [True]}, "prompt holds True, which is no token id"),
        ({"prompt": ["a", 1]}, "prompt holds 'a', which is no token id"),
        ({"prompt": [[[1]]]}, "prompt holds [1], which is no token id"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": {"a": 1}}, "prompt={'a': 1} must be a string or an array, not an object"),
        ({"prompt": "a" * (2**16 + 1)}, "prompt of 65537 tokens must have at most 65536"),
        ({"prompt": "xyz"}, "text holds 'x', 'y', 'z', not among the 17"),
        ({"max_tokens": 10**9}, "max_tokens=1000000000 must be a whole number, 1 to 100000000"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be a whole number, not a number"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number, 1 to 100000000"),
        ({"temperature": True}, "temperature=True must be a number, not true or false"),
        ({"top_p": 2}, "top_p=2 must be a number above 0, at most 1"),
        ({"stop": ["a", 1]}, "stop=['a', 1] must be at most 16 texts"),
        ({"stop": ["a"] * 17}, "must be at most 16 texts"),
        ({"stop": "a" * 1025}, "stop of 1025 characters must have at most 1024"),
        ({"n": 129}, "n=129 must be a whole number, 1 to 128"),
        ({"n": 2, "prompt": ["abc"] * 65}, "65 prompts of 2 choices each exceed 128 choices"),
        ({"n": 0}, "n=0 must be a whole number, 1 to 128"),
        ({"best_of": 129}, "best_of=129 must be a whole number, 1 to 128"),
        ({"best_of": 1, "n": 2}, "best_of=1 must be at least n=2"),
        ({"best_of": 2, "stream": True}, "best_of=2 needs stream=false"),
        ({"n": 20, "prompt": "a" * 2**16}, "prompts of 1310720 tokens in all choices exceed"),
        ({"echo": 1}, "echo=1 must be true or false"),
        ({"logit_bias": {"1": 5}}, "logit_bias={'1': 5} is not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported here; leave it at 0"),
        ({"suffix": "b"}, "suffix='b' is not supported here; leave it at ''"),
        ({"logprobs": 21}, "logprobs=21 must be a whole number, 0 to 20"),
        ({"logprobs": -1}, "logprobs=-1 must be a whole number, 0 to 20"),
        ({"logprobs": True}, "logprobs=True must be a whole number, not true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        ({"stream_options": {"a": 1}, "stream": True}, "may hold include_usage, true or false"),
        ({"user": "a" * 1001}, "user must have at most 1000 characters"),
        (
            {"tempreature": 1},
            "tempreature is no field of a request here; did you mean 'temperature'?",
        ),
    ],
)
def test_impossible_request_is_refused(client, fields, message):
    answer = ask(client, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == 400
    assert message in error["message"] and len(error["message"]) < 300
    assert (error["type"], error["param"]) == ("invalid_request_error", next(iter(fields)))


def test_what_is_no_request_is_refused(client, monkeypatch):
    json_type = {"Content-Type": "application/json"}
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        answer = client.post("/v1/completions", content=content, headers=json_type)
        assert answer.status_code == 400 and "JSON object" in answer.json()["error"]["message"]
    long = b'{"prompt": "' + b"a" * app_module.BODY_BYTES
    assert client.post("/v1/completions", content=long, headers=json_type).status_code == 413
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"
    elsewhere = client.post("/v1/completions", json=ASK, headers={"Host": "example.com"})
    assert elsewhere.status_code == 400
    monkeypatch.setattr(app_module, "CLIENTS", 0)
    assert ask(client).status_code == 429


def test_request_that_takes_too_long_is_dropped(gf):
    hasty = client_of(gf, seconds=0.2, rows=1)
    slow = ask(hasty, max_tokens=10**8)
    assert slow.status_code == 504 and "not done after 0.2 seconds" in slow.text
    assert "not done after" in ask(hasty, max_tokens=10**8, stream=True).text
    none_left(hasty.worker)
    patient = client_of(gf, worker=hasty.worker)  # the one row is free again
    assert ask(patient).json()["choices"][0]["finish_reason"] == "length"


def test_failure_reaches_every_client_and_the_next_request_works(gf, monkeypatch):
    client = client_of(gf)
    with monkeypatch.context() as patch:

        def fail(*args, **options):
            time.sleep(0.05)
            raise MemoryError("no room")
            yield

        patch.setattr(worker_module, "run_queue", fail)
        failed = ask(client)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "generation failed: no room"
    assert ask(client).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "user": "me"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": ""},
        {"prompt": [ASK["prompt"]]},
        {"prompt": LETTERS.encode(ASK["prompt"]).tolist()},
        {"prompt": [LETTERS.encode(ASK["prompt"]).tolist()]},
        {"stream_options": None, "stop": None, "stream": False},
    ],
)
def test_what_changes_nothing_is_taken(client, gf, fields):
    answer = ask(client, **fields)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["text"] == expected(gf).text and choice["logprobs"] is None


def test_content_type_is_matched_as_http_defines_it(client):
    content = json.dumps(ASK).encode()
    post = lambda kind, **more: client.post(
        "/v1/completions", content=content, headers={"Content-Type": kind} | more
    )
    for kind in ("Application/JSON", "application/json ; charset=UTF-8", "application/json;a=b"):
        assert post(kind).status_code == 200
    for kind in ("application/jsonp", "text/plain", "", "application/json; charset=utf-16"):
        assert post(kind).status_code == 415
    assert post("application/json", **{"Content-Encoding": "gzip"}).status_code == 415


def chunks_of(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_usage_of_a_stream_comes_last_and_only_where_it_is_wanted(client):
    *chunks, last = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 40, "total_tokens": 46}
    for options in ({"include_usage": False}, {}):
        chunks = chunks_of(ask(client, stream=True, stream_options=options))
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_logprobs_0_are_those_of_the_tokens_drawn(client, gf):
    [choice] = ask(client, logprobs=0).json()["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["token_logprobs"] == expected(gf).log_probabilities
    assert choice["logprobs"]["text_offset"] == list(range(40))
    chunks = chunks_of(ask(client, logprobs=0, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for part in streamed for x in part[name]] == choice["logprobs"][name]


def test_request_that_fails_is_told_and_ends_nobody_else(gf, client, monkeypatch):
    original, answers = engine.one_slot, {}

    def fail(request, context):
        if request.seed == 666:
            raise MemoryError("no room")
        return original(request, context)

    monkeypatch.setattr(engine, "one_slot", fail)
    one = lambda seed: answers.update({seed: ask(client, seed=seed, max_tokens=200)})
    threads = [threading.Thread(target=one, args=[seed]) for seed in (1, 666, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[666].status_code == 500 and "no room" in answers[666].text
    assert answers[666].json()["error"]["type"] == "server_error"
    for seed in (1, 2, 3):
        text = answers[seed].json()["choices"][0]["text"]
        assert text == expected(gf, seed=seed, max_tokens=200).text
    none_left(client.worker)
