"""The page as a user gets it: what is in it, that it stands alone, that it draws, and mistakes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import analysis, checkpoint, inspect
from gt_jax.data import tokenizer_from_dict
from gt_jax.data.tokenizers import CharTokenizer, train_sentencepiece
from gt_jax.errors import InputError
from gt_jax.models import make_model
from tests.models.small_models import lively_parameters, small_config

HOSTILE = '<!-- &amp; </script> "quoted" \\ end\n<script>x()</script>'


def save(folder, tokenizer, **fields):
    config = small_config(vocab_size=tokenizer.vocab_size, **fields)
    params = lively_parameters(make_model(config), jnp.zeros((1, 1), jnp.int32))
    checkpoint.save_model(folder, config, params, tokenizer)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    tokenizer = CharTokenizer(HOSTILE)
    return save(tmp_path_factory.mktemp("models") / "gf", tokenizer, fusion="gf", layers=1)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    tokenizer = CharTokenizer("abc")
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    return save(folder, tokenizer, architecture="gpt2", layers=1, max_positions=8)


@pytest.fixture(scope="module")
def page(hybrid, tmp_path_factory):
    """The page of HOSTILE, which it holds as data."""
    out = tmp_path_factory.mktemp("page") / "inspect.html"
    inspect.main(["inspect", f"--checkpoint={hybrid}", f"--text={HOSTILE}", f"--out={out}"])
    return out


def data_of(page):
    text = page.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', text)[1])


def test_page_holds_the_measures_of_its_text(page, hybrid):
    model, params, tokenizer = checkpoint.load(hybrid)
    found = analysis.trace(model, params, tokenizer.encode(HOSTILE))
    data = data_of(page)
    assert "".join(data["tokens"]) == HOSTILE
    assert data["measures"]["loss"][0][0] is None
    np.testing.assert_allclose(data["measures"]["loss"][0][1:], found.loss[1:], rtol=1e-3)
    for name, values in found.blocks.items():
        mean, *layers = data["measures"][name]
        np.testing.assert_allclose(layers, values, rtol=1e-3)
        np.testing.assert_allclose(mean, np.mean(values, axis=0), rtol=1e-3)
    for part, norms in found.states.items():
        np.testing.assert_allclose(data["states"][part], norms, rtol=1e-3)
    assert data["places"][0][0] == np.argmin(found.blocks["cosine"][0])


def test_page_needs_nothing_else(page):
    text = page.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|\burl\(|\bfetch\b", text)


def test_page_draws_itself_in_a_browser(page, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here; apt install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'c'}"]
    probed = tmp_path / "probed.html"
    probe = "<script>document.title = document.getElementById('text').offsetHeight</script>"
    probed.write_text(page.read_text("utf-8") + probe, "utf-8")
    dom = subprocess.run(
        [chromium, *flags, "--virtual-time-budget=2000", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert f'data-ready="{len(HOSTILE)}"' in dom  # set by the last line of the script
    shown = re.search(r'<pre id="text".*?>(.*?)</pre>', dom, re.DOTALL)[1]
    assert shown.count("color-mix") == len(HOSTILE)
    assert "&lt;script&gt;" in re.sub(r"</?span.*?>", "", shown)
    assert dom.count('class="chart card"') == 2
    assert int(re.search("<title>(.*?)</title>", dom)[1]) < 120  # as high as its two lines


def test_model_with_one_branch_shows_what_it_has(attention, tmp_path, capsys):
    out = tmp_path / "page.html"
    text = "abcabcabcabc"
    inspect.main(["inspect", f"--checkpoint={attention}", f"--text={text}", f"--out={out}"])
    assert "The first 8 of the text's 12 tokens (the positions this model has)." in (
        capsys.readouterr().out
    )
    data = data_of(out)
    assert list(data["measures"]) == ["loss"] and data["states"] == {}
    assert None not in data["measures"]["loss"][0][1:]
    assert data["notes"][0].startswith("The first 8") and "one branch" in data["notes"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either as --text=TEXT or as --file=FILE"),
        (["--text=a", "--file=b"], "either as --text=TEXT or as --file=FILE"),
        (["--text="], "--text is empty"),
        (["--text=a"], "--text must be at least two tokens long, not 1"),
        (["--text=aΩc"], "--text: text holds 'Ω', not among the 3 characters"),
        (["--text=abc", "--max_tokens=1"], "--max_tokens=1 must be at least 2"),
        (["--file=nowhere.txt"], "--file=nowhere.txt cannot be read (No such file"),
        (["--text=abc", "--checkpoint=nowhere"], "nowhere holds no checkpoint"),
    ],
)
def test_mistake_is_one_line(arguments, message, attention, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        inspect.main(["inspect", f"--checkpoint={attention}", f"--out={out}", *arguments])
    assert message in str(error.value)
    assert not out.exists()


def test_file_that_is_no_text_is_refused(attention, tmp_path):
    file = tmp_path / "binary"
    file.write_bytes(b"ab\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        inspect.main(["inspect", f"--checkpoint={attention}", f"--file={file}"])


def test_spelling_joins_to_the_text():
    text = "to be  or\n not: naïve 日本語 🙂\n"
    subwords = train_sentencepiece(["to be or not to be that is the question\n" * 20], 290)
    for tokenizer in (CharTokenizer(text), subwords):
        ids = tokenizer.encode(text)
        spelt = inspect.spell(tokenizer, ids)
        assert len(spelt) == len(ids) and "".join(spelt) == text
    ids = tokenizer_from_dict({"kind": "ids", "vocab_size": 99})
    assert inspect.spell(ids, [17, 4, 2]) == ["17", " 4", " 2"]


def test_numbers_that_are_not_finite_become_null():
    values = np.array([[1.23456, np.nan], [np.inf, -0.0]], np.float32)
    assert inspect.plain(values) == [[1.235, None], [None, 0.0]]


def test_the_page_of_a_run_lies_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "converted").mkdir()
    assert inspect.default_out("run") == Path("run/inspect.html")
    assert inspect.default_out("run/checkpoints/5") == Path("run/inspect.html")
    assert inspect.default_out("converted") == Path("inspect.html")


def test_a_device_or_pipe_for_a_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(InputError, match=r"cannot be read \(it is no regular file"):
            inspect.read_text(SimpleNamespace(text=None, file=str(path)))
