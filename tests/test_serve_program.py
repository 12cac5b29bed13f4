"""`python -m gt_jax.serve` as people start and end it, asked by curl."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gt_jax import checkpoint
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.models import ModelConfig, make_model
from tests.models.small_models import lively_parameters, random_tokens
from tests.ports import free_port

pytest.importorskip("uvicorn", reason="serving needs uvicorn")
curl = shutil.which("curl")
pytestmark = pytest.mark.skipif(curl is None, reason="curl is not installed")
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program") / "small"
    config = ModelConfig(17, "mamba2", dim=32, layers=1, state_size=16)
    params = lively_parameters(make_model(config), random_tokens(1, 1))
    checkpoint.save_model(folder, config, params, CharTokenizer("abcdefghijklmnopq"))
    return folder


def start(folder, tmp_path, **environment):
    """(the process, its port), once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "gt_jax.serve", f"--checkpoint={folder}", f"--port={port}"]
    command += ["--max_tokens=100000000", "--stop_seconds=120"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | environment)
    end = time.monotonic() + 120
    while subprocess.run(
        [curl, "-sf", f"http://127.0.0.1:{port}/health"], capture_output=True
    ).returncode:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.1)
    return process, port


def curl_of(port, path, body=None, *options):
    command = [curl, "-s", *options, f"http://127.0.0.1:{port}{path}"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    return [*command, *(["-d", json.dumps(body)] if body else [])]


def test_program_answers_curl_and_finishes_what_runs_when_it_is_ended(folder, tmp_path):
    process, port = start(folder, tmp_path, GT_JAX_API_KEY=KEY)
    try:
        run = lambda *args: subprocess.run(curl_of(port, *args), capture_output=True, text=True)
        answer = run("/v1/completions", {"prompt": "abc", "max_tokens": 5}, "-i").stdout
        assert answer.startswith("HTTP/1.1 200") and "x-request-id: req-" in answer
        text = json.loads(answer.split("\n\n")[1])["choices"][0]["text"]
        assert len(text) == 5
        assert json.loads(run("/v1/models").stdout)["data"][0]["id"] == "small"
        error = json.loads(run("/v1/chat/completions", {"messages": [{"role": "user"}]}).stdout)
        assert "has no template of dialogues" in error["error"]["message"]
        assert error["error"]["param"] == "messages"

        body = {"prompt": "abc", "max_tokens": 6000, "stream": True}
        streams = subprocess.Popen(
            curl_of(port, "/v1/completions", body, "-N"), stdout=subprocess.PIPE, text=True
        )
        assert streams.stdout.readline().startswith("data: ")
        process.send_signal(signal.SIGTERM)
        rest = streams.stdout.read()
        assert '"finish_reason": "length"' in rest and rest.rstrip().endswith("data: [DONE]")
        assert process.wait(120) == 0
        assert run("/health").returncode != 0
    finally:
        process.kill()
        process.wait()
    log = (tmp_path / "log").read_text()
    assert "small: compiled in" in log and KEY not in log
    assert "POST /v1/completions 200" in log and "6000 drawn" in log


@pytest.mark.parametrize("key", ["", " zq", "äzq"])
def test_key_that_protects_nothing_is_refused(folder, key):
    from gt_jax import serve
    from gt_jax.errors import InputError

    with pytest.raises(InputError, match="--api_key") as caught:
        serve.main(["serve", f"--checkpoint={folder}", f"--api_key={key}"])
    assert "zq" not in str(caught.value)
