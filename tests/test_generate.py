"""generate() for one prompt, and the program: one-shot, interactive, with a state in a file."""

import builtins
import re
import sys

import numpy as np
import pytest

from gt_jax import generate as program
from gt_jax.checkpoint import save_model
from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generation import Request, complete, generate
from gt_jax.generation.prompts import encode_prompt
from tests.models.small_models import random_tokens, small_model

TOKENIZER = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmno\np"})
PROMPT = "abba\n" * 16  # a chunk of 64 tokens, and more


@pytest.fixture(scope="module")
def small():
    return small_model("gf")


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """run(*arguments) calls the program on a checkpoint of the small model."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, small.model.config, small.params, TOKENIZER)
    default = ("--max_tokens=12", f"--checkpoint={folder}")
    return lambda *arguments: program.main(["program", *default, *map(str, arguments)])


@pytest.fixture
def type_lines(monkeypatch):
    """type_lines(*lines) makes input() return these, then end."""

    def type_(*lines):
        lines = iter(lines)

        def read_line(prompt):
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(builtins, "input", read_line)

    return type_


def test_tokens_are_those_of_the_engine(small):
    prompt = np.asarray(random_tokens(1, 20)[0])
    tokens = list(generate(small.model, small.params, prompt, max_tokens=35, seed=3))
    request = Request(prompt, max_tokens=35, seed=3)
    assert tokens == complete(small.model, small.params, [request], rows=1)[0].tokens
    with pytest.raises(InputError, match="top_p=3 must be a number above 0"):
        generate(small.model, None, prompt, max_tokens=4, top_p=3)


def test_prompt_and_reply_are_printed(run, small, capsys):
    run(f"--prompt={PROMPT}", "--seed=4", "--top_k=5", "--stats")
    printed = capsys.readouterr()
    request = Request(TOKENIZER.encode(PROMPT), max_tokens=12, seed=4, top_k=5)
    [reply] = complete(small.model, small.params, [request], tokenizer=TOKENIZER, rows=1)
    assert printed.out == f"{PROMPT}{reply.text}\n"
    assert re.search(r"prefill: 64 tokens, \S+ tokens/s; decode: 27 tokens \(12 new\)", printed.err)


def test_what_compiling_says_comes_before_the_prompt_and_not_into_the_text(
    run, capsys, monkeypatch
):
    def stream(*args, **kwargs):
        print("from the cache", file=sys.stderr)
        yield from usual(*args, **kwargs)

    run(f"--prompt={PROMPT}")
    text = capsys.readouterr().out
    usual = program.stream
    monkeypatch.setattr(program, "stream", stream)
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # one terminal
    run(f"--prompt={PROMPT}")
    assert capsys.readouterr().out.endswith(f"from the cache\n{text}")


def test_the_prompt_is_printed_where_nothing_follows_it(run, capsys, monkeypatch):
    monkeypatch.setattr(program, "stream", lambda *args, **kwargs: iter(()))
    run(f"--prompt={PROMPT}")
    assert capsys.readouterr().out == f"{PROMPT}\n"


def test_text_continues_from_a_state_in_a_file(run, tmp_path, capsys):
    file, greedy = tmp_path / "state", ("--temperature=0", "--max_tokens=30")
    run(f"--prompt={PROMPT}", *greedy)
    whole = capsys.readouterr().out
    run(f"--prompt={PROMPT}", "--temperature=0", f"--save_state={file}")
    run("--prompt=", "--temperature=0", "--max_tokens=18", f"--state={file}")
    assert capsys.readouterr().out.replace("\n", "") == whole.replace("\n", "")


def test_lines_typed_make_one_text_with_the_replies(run, small, type_lines, capsys):
    greedy = ("--temperature=0", "--stop=\n")
    type_lines("ab", "Ω", "cd", "")
    run(*greedy)
    printed = capsys.readouterr()
    assert printed.err.count("error: prompt='") == 1 and "'Ω'" in printed.err

    text, replies = "", []
    for line in ("ab", "cd", ""):
        text += ("\n" if line and text and not text.endswith("\n") else "") + line
        request = Request(TOKENIZER.encode(text), max_tokens=12, temperature=0.0, stop=("\n",))
        [reply] = complete(small.model, small.params, [request], tokenizer=TOKENIZER, rows=1)
        text += TOKENIZER.decode(reply.tokens)
        replies.append(reply.text)
    assert printed.out == "\n".join([*replies, "\n"])


@pytest.mark.parametrize("moment", ["encode_prompt", "prefill", "stream"])
def test_ctrl_c_ends_a_reply_from_its_first_moment_on(run, type_lines, capsys, monkeypatch, moment):
    usual, calls = getattr(program, moment), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return usual(*args, **kwargs)

    type_lines("abab", "cd")
    run("--temperature=0")
    whole = capsys.readouterr().out
    monkeypatch.setattr(program, moment, interrupted)
    type_lines("abab", "cd", "")
    run("--temperature=0")
    printed = capsys.readouterr()
    assert len(calls) > 1 and printed.err == ""
    assert len(printed.out) > len(whole) - 2  # the later replies came


def test_speed_of_nothing_is_not_printed(run, capsys):
    run("--prompt=a", "--max_tokens=1", "--stats")
    printed = capsys.readouterr().err
    expected = "prefill: none, 1 prompt tokens are read while decoding; decode: 1 tokens (1 new)"
    assert printed.startswith(expected)
    assert " 0 tokens/s" not in printed


def test_mistakes_are_found_before_the_model_is_loaded():
    with pytest.raises(InputError, match=r"min_p=2\.0 must be a number from 0 to 1"):
        program.main(["program", "--checkpoint=nowhere", "--prompt=a", "--min_p=2"])


@pytest.mark.parametrize("kind", ["char", "char97"])
def test_prompt_outside_the_vocabulary_is_refused_with_its_characters(kind):
    tokenizer = tokenizer_from_dict({"kind": kind, "alphabet": "abc"})
    assert tokenizer.decode(encode_prompt(tokenizer, "cab", "--prompt")) == "cab"
    with pytest.raises(InputError, match=r"--prompt='aüz'.*'z'.*'ü'"):
        encode_prompt(tokenizer, "aüz", "--prompt")
