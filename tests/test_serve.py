"""The HTTP endpoint against the engine, with the library's test client."""

import functools
import json
import threading
import time

import pytest

from gt_jax import serve
from gt_jax.data import tokenizer_from_dict
from gt_jax.generation import Request, Worker, complete
from gt_jax.generation import worker as worker_module
from tests.models.small_models import small_model

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
    parse = functools.partial(serve.parse, model=gf[0], tokenizer=LETTERS, max_tokens=10**8)
    app = serve.make_app(worker, parse, name="small", seconds=seconds)
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
    assert not client.worker.clients


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": ["abc"]}, "prompt=['abc'] must be str, not list"),
        ({"prompt": "xyz"}, "text holds 'x', 'y', 'z', not among the 17"),
        ({"max_tokens": 10**9}, "max_tokens=1000000000 must be at most 100000000"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be int, not float"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": True}, "temperature=True must be int or float, not bool"),
        ({"top_p": 2}, "top_p=2 must be above 0, at most 1"),
        ({"stop": ["a", 1]}, "stop=['a', 1] must be at most 4 texts"),
        (
            {"tempreature": 1},
            "tempreature is no field of a request here; did you mean 'temperature'?",
        ),
    ],
)
def test_impossible_request_is_refused(client, fields, message):
    answer = ask(client, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == 400
    assert message in answer.json()["error"]["message"]


def test_what_is_no_request_is_refused(client, monkeypatch):
    json_type = {"Content-Type": "application/json"}
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        answer = client.post("/v1/completions", content=content, headers=json_type)
        assert answer.status_code == 400 and "JSON object" in answer.json()["error"]["message"]
    long = b'{"prompt": "' + b"a" * serve.BODY_BYTES
    assert client.post("/v1/completions", content=long, headers=json_type).status_code == 413
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"
    elsewhere = client.post("/v1/completions", json=ASK, headers={"Host": "example.com"})
    assert elsewhere.status_code == 400
    monkeypatch.setattr(serve, "CLIENTS", 0)
    assert ask(client).status_code == 429


def test_request_that_takes_too_long_is_dropped(gf):
    hasty = client_of(gf, seconds=0.2, rows=1)
    slow = ask(hasty, max_tokens=10**8)
    assert slow.status_code == 504 and "not done after 0.2 seconds" in slow.text
    assert "not done after" in ask(hasty, max_tokens=10**8, stream=True).text
    assert not hasty.worker.clients
    patient = client_of(gf, worker=hasty.worker)  # the one row is free again
    assert ask(patient).json()["choices"][0]["finish_reason"] == "length"


def test_failure_reaches_every_client_and_the_next_request_works(gf, monkeypatch):
    client = client_of(gf)
    with monkeypatch.context() as patch:

        def fail(*args, **options):
            time.sleep(0.05)
            raise MemoryError("no room")
            yield

        patch.setattr(worker_module, "work_off", fail)
        failed = ask(client)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "generation failed: no room"
    assert ask(client).status_code == 200
