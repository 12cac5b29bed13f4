"""A real server on a socket: hostile bodies, stalled connections, clients that leave, a crowd."""

import contextlib
import functools
import json
import threading
import time

import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.generation import Request, contexts, engine
from tests.models.small_models import small_model
from tests.serving import Serving, none_left, wait_for

LETTERS = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
ENDLESS = 10**8
HEAD, BODY, WHOLE = 1.0, 1.0, 4.0  # seconds
LONGEST = 60  # seconds, after which something hangs
LONG = "9" * 5000


def start_serving(**options):
    small = small_model("mamba2")
    return Serving(small.model, small.params, LETTERS, max_tokens=ENDLESS, **options)


def expected(serving, **fields):
    fields = {"max_tokens": 5, "temperature": 0} | fields
    return serving.engine([Request(LETTERS.encode("abc"), **fields)])[0].text


@pytest.fixture(scope="module")
def serving():
    """With the usual time for headers and body: clients of a busy machine are slow."""
    serving = start_serving(rows=4)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def hasty():
    """With little time for headers and body."""
    serving = start_serving(rows=4, head_seconds=HEAD, body_seconds=BODY)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def single():
    """One row, and little time for a whole request."""
    serving = start_serving(rows=1, request_seconds=WHOLE)
    yield serving
    serving.stop()


def raw_request(body, length=None):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = len(body) if length is None else length
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def hostile_bodies():
    """JSON texts, none of which is a request."""
    wrong = ["1e400", "-1e400", "NaN", "Infinity", LONG, f"-{LONG}", f"1e{LONG}", "1e308", "-1"]
    wrong += ['"1"', "[]", "{}", "true", "[" * 500 + "]" * 500]
    numbers = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    for name in numbers:
        for value in wrong:
            yield f'{{"prompt": "abc", "{name}": {value}}}'
    for value in ("1e400", LONG, "1.5", '"1"', "[1]", str(2**40)):
        yield f'{{"prompt": "abc", "seed": {value}}}'
    for value in (LONG, "129", "0", "-1", "true", "{}", '"x"'):
        for name in ("n", "best_of", "logprobs"):
            if not (name == "logprobs" and value == "0"):
                yield f'{{"prompt": "abc", "{name}": {value}}}'
    for value in (f"[{LONG}]", "[1e400]", "[[1, [2]]]", "[17]", "[-1]", "[1.5]", "[null]", "{}"):
        yield f'{{"prompt": {value}}}'
    for value in (
        '"\\ud83d"',
        '["\\ud83d"]',
        "3",
        "[1]",
        '[""]',
        '""',
        "[" + ", ".join(['"a"'] * 17) + "]",
    ):
        yield f'{{"prompt": "abc", "stop": {value}}}'
    yield f'{{"prompt": "abc", "stop": "{"a" * 100_000}"}}'
    yield f'{{"prompt": "{"a" * 100_000}"}}'
    yield f'{{"prompt": "abc", "{"x" * 100_000}": 1}}'
    yield f'{{"prompt": "abc", "stream_options": {{"include_usage": {LONG}}}, "stream": true}}'
    yield from ('{"prompt": "abc", "\\ud83d": 1}', '{"prompt": "a", "prompt": "b"}', '{"a": 1,}')
    yield from ("[" * 100_000, '{"a":' * 100_000, "[]", "null", "3", LONG, '"abc"', "", " ", "\0")


def test_hostile_bodies_are_refused_by_name_and_change_nothing(serving):
    before = serving.text()
    bodies = [body.encode() for body in hostile_bodies()]
    bodies += [b"\xff", b'{"prompt": "\xff"}', b'\xef\xbb\xbf{"prompt": "a"}']
    bodies += [json.dumps({"prompt": "abc"}).encode(code) for code in ("utf-16", "utf-32")]
    assert len(bodies) > 130
    for body in bodies:
        status, answer = serving.post(body)
        assert status == 400, (body[:100], answer)
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
        assert len(error["message"]) < 400, body[:100]
        if body.startswith(b'{"prompt": "abc", "'):
            assert error["param"], (body[:100], answer)
    _, answer = serving.post(f'{{"prompt": "abc", "max_tokens": {LONG}}}'.encode())
    assert "a whole number of about 5000 digits" in answer["error"]["message"]
    assert serving.post(b" " * (2**20 + 1))[0] == 413
    assert serving.text() == before
    none_left(serving.worker)


def closed_after(client, began):
    """Seconds until the server closes a connection, and what it sent before."""
    data = b""
    with contextlib.suppress(ConnectionResetError), client:
        while part := client.recv(65536):
            data += part
    return time.monotonic() - began, data


def test_connections_that_stall_are_closed_and_others_served(hasty):
    body = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()
    answered = raw_request(body)
    starts = {
        "silent": b"",
        "half a line": b"POST /v1/comp",
        "half the headers": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-",
        "no body": raw_request(b"", 10),
        "half the body": raw_request(body[:5], len(body)),
        "idle after an answer": answered,
        "half a line after an answer": answered + b"POST /v1/comp",
    }
    began = time.monotonic()
    clients = [(name, hasty.connect(start)) for name, start in starts.items() for _ in range(20)]
    body = json.dumps({"prompt": "abc", "max_tokens": 5, "temperature": 0}).encode()
    _, answer = closed_after(hasty.connect(raw_request(body)), began)
    text = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    assert text == expected(hasty)
    for name, client in clients:
        seconds, data = closed_after(client, began)
        assert seconds < LONGEST, name
        statuses = [line for line in data.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
        wanted = b"408" if "body" in name else b"200" if "answer" in name else None
        assert [line.split()[1] for line in statuses] == ([wanted] if wanted else []), name


def test_body_that_drips_is_cut_off(hasty):
    client = hasty.connect(raw_request(b"", 10_000))
    began, data, part = time.monotonic(), b"", None
    client.settimeout(0.2)
    with contextlib.suppress(ConnectionError), client:
        while part != b"" and time.monotonic() - began < LONGEST:
            with contextlib.suppress(ConnectionError):  # what it sent before can still be read
                client.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                part = client.recv(1000)
                data += part
    assert b"408" in data and time.monotonic() - began < LONGEST


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_is_no_longer_computed(single, stream):
    body = json.dumps({"prompt": "abc", "max_tokens": ENDLESS, "stream": stream}).encode()
    clients = [single.connect(raw_request(body)) for _ in range(3)]  # one draws, two wait
    wait_for(lambda: len(single.worker.clients) == 3)
    for client in clients:
        client.close()
    none_left(single.worker)
    assert single.text() == expected(single)  # in the one row


def test_request_without_end_is_cut_off(single):
    body = json.dumps({"prompt": "abc", "max_tokens": ENDLESS}).encode()
    began = time.monotonic()
    seconds, data = closed_after(single.connect(raw_request(body)), began)
    assert WHOLE - 0.5 < seconds < LONGEST and data == b""
    none_left(single.worker)


def test_long_prompt_does_not_hold_up_a_stream(serving, monkeypatch):
    """Others draw while it is read, here in turns of 256 tokens."""
    monkeypatch.setattr(contexts, "PREFILL_CHUNKS", (64, 256))
    monkeypatch.setattr(engine, "TURN", 256)
    prompt = "abcdefgh" * 640
    done, streamed = {}, []
    long = lambda: done.update(text=serving.text(prompt=prompt), at=time.monotonic())
    serving.text(prompt=prompt)  # compiled
    body = json.dumps({"prompt": "abc", "max_tokens": ENDLESS, "stream": True}).encode()
    with serving.connect(raw_request(body)) as client:
        client.recv(1000)
        thread = threading.Thread(target=long)
        thread.start()
        while thread.is_alive():
            client.recv(65536)
            streamed.append(time.monotonic())
        thread.join()
    assert len(streamed) >= 10 and done["text"]


def test_200_clients_at_once_get_what_they_would_alone(serving):
    seeds = range(200)
    fields = lambda seed: {"temperature": 1.0, "seed": seed, "max_tokens": 4 + seed % 40}
    texts, errors = {}, []

    def one(seed):
        try:
            texts[seed] = serving.text(**fields(seed))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=[seed]) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    requests = [Request(LETTERS.encode("abc"), **fields(seed)) for seed in seeds]
    alone = serving.engine(requests)
    assert texts == {seed: completion.text for seed, completion in enumerate(alone)}
    none_left(serving.worker)


def test_openais_client_reads_answers_streams_and_errors(serving):
    openai = pytest.importorskip("openai", reason="a check with OpenAI's own client")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{serving.port}/v1", api_key="none", max_retries=0
    )
    ask = functools.partial(client.completions.create, model="x", prompt="abc", temperature=0)
    answer = ask(max_tokens=40, n=1, best_of=1, echo=False, logprobs=0, user="me")
    assert answer.choices[0].text == expected(serving, max_tokens=40)
    assert len(answer.choices[0].logprobs.token_logprobs) == 40
    *chunks, last = ask(max_tokens=40, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert last.usage == answer.usage
    with pytest.raises(openai.BadRequestError) as caught:
        ask(max_tokens=0)
    assert (caught.value.param, caught.value.type) == ("max_tokens", "invalid_request_error")
