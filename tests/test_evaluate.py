"""Evaluation of a model that no run here trained: what it prints, and mistakes."""

import json
import math
import re
import string

import jax
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.data import load_held_out
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.evaluate import main
from gt_jax.models import ModelConfig, make_model
from tests.convert import small
from tests.models.small_models import lively_parameters, random_tokens

TEXT = "the cat sat on the mat\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three converted models, and texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    letters = CharTokenizer(string.ascii_lowercase + " \n.")
    small.save("rwkv6", folder / "rwkv6", letters)
    small.save("rwkv6", folder / "ids", IdTokenizer(small.VOCAB))
    config = ModelConfig(small.VOCAB, "gpt2", dim=32, layers=1, heads=2, max_positions=32)
    params = lively_parameters(make_model(config), random_tokens(1, 1))
    checkpoint.save_model(folder / "gpt2", config, params, letters)
    (folder / "text.txt").write_text(TEXT)
    (folder / "wide.txt").write_text("the 猫 sat")
    (folder / "ids.txt").write_text("17 4 2 11 5")
    lines = [json.dumps({"text": text, "body": text}) for text in ("a cat", "x", "on the mat")]
    (folder / "many.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(folder, capsys):
    """run(model, source, *flags) -> what is printed."""

    def run(model, source, *flags):
        main(["evaluate", f"--checkpoint={folder / model}", f"--source={folder / source}", *flags])
        return capsys.readouterr().out

    return run


def loss_of(printed):
    return float(re.search(r"loss (\d+\.\d+)", printed)[1])


def test_converted_model_reads_a_file_as_one_stream(folder, run):
    printed = run("rwkv6", "text.txt")
    model, params, tokenizer = checkpoint.load(folder / "rwkv6")
    ids = tokenizer.encode(TEXT)
    logits = jax.jit(model.apply)({"params": params}, ids[None, :-1]).logits[0]
    log_probs = jax.nn.log_softmax(logits)
    loss = -np.mean(np.asarray(log_probs)[np.arange(len(ids) - 1), ids[1:]], dtype=np.float64)
    assert loss_of(printed) == pytest.approx(loss, abs=1e-4)
    assert f"{loss / math.log(2):.4f} bits/byte" in printed
    assert f"{len(ids) - 1} tokens in 1 document, state carried to the end" in printed


def test_windows_are_read_on_request_and_by_attention_models(run):
    short = run("rwkv6", "text.txt", "--seq_len=2", "--stride=1")
    assert "459 tokens in windows of 2, one every 1" in short
    assert loss_of(short) != loss_of(run("rwkv6", "text.txt"))
    assert "459 tokens in windows of 32, one every 16" in run("gpt2", "text.txt")


def test_documents_count_apart_and_the_batch_size_does_not_matter(run):
    printed = run("rwkv6", "many.jsonl", "--batch_size=1")
    assert "13 tokens in 2 documents" in printed
    assert loss_of(printed) == loss_of(run("rwkv6", "many.jsonl", "--field=body"))


def test_bits_per_character_and_byte_are_of_the_text(run):
    assert "bits/byte" not in run("ids", "ids.txt")
    assert "bits/token, perplexity" in run("ids", "ids.txt")


@pytest.mark.parametrize(
    ("model", "source", "flags", "message"),
    [
        ("gpt2", "text.txt", ["--seq_len=64"], "--seq_len=64 exceeds the 32 positions"),
        ("rwkv6", "text.txt", ["--seq_len=8", "--stride=9"], "--stride=9 must be at most"),
        ("rwkv6", "text.txt", ["--batch_size=0"], "--batch_size=0"),
        ("rwkv6", "nowhere.txt", [], "nowhere.txt' is no file"),
        (
            "rwkv6",
            "many.jsonl",
            ["--field=words"],
            "no text in --field='words'; name one of its fields: text, body",
        ),
        ("rwkv6", "wide.txt", [], "wide.txt: text holds '猫'"),
        ("ids", "text.txt", [], "text.txt: this model has no tokenizer"),
    ],
)
def test_mistakes_are_one_line(run, model, source, flags, message):
    with pytest.raises(InputError) as caught:
        run(model, source, *flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_converted_model_needs_a_source(folder):
    with pytest.raises(InputError, match=r"--source is missing: .* is a converted model"):
        main(["evaluate", f"--checkpoint={folder / 'rwkv6'}"])


def test_lone_document_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    assert load_held_out(str(tmp_path / "a.txt")) == ("one document",)
    (tmp_path / "b.txt").write_text("and another")
    assert load_held_out(str(tmp_path)) == ("one document", "and another")


def test_of_a_folder_with_splits_the_validation_split_is_read(folder, run, tmp_path):
    for name, text in (("train", "a cat " * 99), ("valid", TEXT), ("test", "mat " * 50)):
        (tmp_path / f"{name}.txt").write_text(text)
    alone, named = (run("rwkv6", path) for path in (tmp_path / "valid.txt", tmp_path))
    assert alone.split(": ")[1] == named.split(": ")[1]
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(InputError, match=r"--source=.* none to validate on; .* as .*/test.txt$"):
        run("rwkv6", tmp_path)
