"""The adapter's three answers, and a local task run by lm-evaluation-harness where it is there."""

import io
import json
import string
import sys
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest

from gt_jax import checkpoint, cli, harness, scoring
from gt_jax.data.pretrained import HuggingFaceTokenizer, IdTokenizer, WorldTokenizer
from gt_jax.data.sentence_piece import SentencePieceTokenizer
from gt_jax.data.tokenizers import CharTokenizer, TaggedCharTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from tests.models.small_models import lively_parameters, random_tokens

LETTERS = CharTokenizer(string.ascii_lowercase + " \n.")
# Ids 1 to 28; "ab" is one token, and so are "a" and "b".
TOKENS = ["\n", " ", "ab", *string.ascii_lowercase[:25]]
WORLD = "".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(TOKENS, start=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models; attention compiles quickest, and what is tested here is the same for all."""
    folder = tmp_path_factory.mktemp("harness")

    def save(name, tokenizer, architecture="gpt2", max_positions=512):
        config = ModelConfig(
            29, architecture, dim=32, layers=1, heads=2, max_positions=max_positions
        )
        params = lively_parameters(make_model(config), random_tokens(1, 1))
        checkpoint.save_model(folder / name, config, params, tokenizer)

    save("letters", LETTERS)
    save("short", LETTERS, max_positions=32)
    save("world", WorldTokenizer(WorldTokenizer.pack(WORLD)))
    save("recurrent", LETTERS, architecture="rwkv6")
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    return harness.Adapter(folder / "letters")


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def log_p(folder, context, continuation):
    """log p of the ids of a continuation, from one plain call."""
    model, params, _ = checkpoint.load(folder)
    ids = np.concatenate([context, continuation]).astype(np.int32)
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, ids[None, :-1]).logits[0])
    chosen = np.asarray(log_probs)[np.arange(len(ids) - 1), ids[1:]]
    return chosen[len(context) - 1 :].sum()


def test_loglikelihood_is_of_the_continuation(folder, adapter):
    (plain, _), (bare, _) = adapter.loglikelihood(requests(("the cat", " sat"), ("", "a cat sat")))
    encode = LETTERS.encode
    assert plain == pytest.approx(
        log_p(folder / "letters", encode("the cat"), encode(" sat")), 1e-4
    )
    assert bare == pytest.approx(log_p(folder / "letters", encode("\n"), encode("a cat sat")), 1e-4)


def test_token_across_the_border_is_divided_as_the_harness_divides_it(folder):
    """HFLM takes the context's own ids, and of the whole those past their number."""
    adapter = harness.Adapter(folder / "world")
    (found, _), (first, _) = adapter.loglikelihood(requests(("c a", "b c"), ("a", "b")))
    encode = WorldTokenizer(WorldTokenizer.pack(WORLD)).encode
    assert len(encode("ab")) == 1
    assert found == pytest.approx(log_p(folder / "world", encode("c a"), encode(" c")), 1e-4)
    assert first == pytest.approx(log_p(folder / "world", [0], encode("ab")), 1e-4)


def test_rolling_is_of_the_whole_text(folder, adapter):
    texts = ["a cat sat on the mat", "x"]
    found = adapter.loglikelihood_rolling(requests(*((text,) for text in texts)))
    want = [log_p(folder / "letters", LETTERS.encode("\n"), LETTERS.encode(t)) for t in texts]
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_rolling_past_the_positions_counts_every_token(folder):
    text = "the cat sat on the mat and the dog sat on the cat."
    found = harness.Adapter(folder / "short").loglikelihood_rolling(requests((text,)))[0]
    ids = LETTERS.encode("\n" + text)
    want = log_p(folder / "short", ids[:1], ids[1:33])
    want += log_p(folder / "short", ids[-33:][: 66 - len(ids)], ids[33:])
    assert found == pytest.approx(want, 1e-4)


def test_generation_ends_before_its_stop_and_at_its_length(adapter):
    settings = {"max_gen_toks": 24, "do_sample": False}
    whole = adapter.generate_until(requests(("the cat", settings | {"until": []})))[0]
    assert len(whole) == 24
    stop = whole[5:7]
    more = [
        ("the cat", settings | {"until": stop}),
        ("a", {"max_gen_toks": 3}),
        ("", {"until": []}),
    ]
    found = adapter.generate_until(requests(*more))
    assert found[0] == whole[: whole.index(stop)]
    assert [len(text) for text in found[1:]] == [3, 256]


def test_generation_ends_at_the_end_of_a_text(folder):
    adapter = harness.Adapter(folder / "world")
    assert adapter._cut([1, 4, 0, 5], []) == (adapter._tokenizer.decode([1, 4]), True)


def test_what_it_cannot_do_is_said(folder, adapter):
    with pytest.raises(InputError, match="do_sample=False"):
        adapter.generate_until(requests(("a", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(InputError, match="num_beams=4 is not supported"):
        adapter.generate_until(requests(("a", {"num_beams": 4})))
    with pytest.raises(InputError, match="holds '猫'"):
        adapter.loglikelihood_rolling(requests(("猫",)))
    with pytest.raises(InputError, match=r"\(ids\) has no token for the beginning or the end"):
        harness.start_id(IdTokenizer(29))


def words(*more):
    """A tokenizer.json that names no special ids; id 0 stands for all text it does not know."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(("[UNK]", "a", *more))}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    return HuggingFaceTokenizer(made.to_str())


def sentence_piece(**options):
    """Of these options; it names 1 and 2 for the beginning and the end of a text."""
    sentencepiece, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat", "a cat ran"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=4,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda: CharTokenizer("\nab"), 0),
        (lambda: words("\n"), 2),
        (lambda: words("\n", "<|endoftext|>"), 3),
        (lambda: TaggedCharTokenizer("ab\n"), 32),
        (lambda: TaggedCharTokenizer("ab"), 2),
        (lambda: sentence_piece(user_defined_symbols=["\n"]), 3),
        (lambda: sentence_piece(model_type="word"), 1),
        (sentence_piece, 1),
    ],
)
def test_texts_start_with_a_newline_else_with_what_the_tokenizer_names(make, start):
    """Never with the id of unknown text."""
    assert harness.start_id(make()) == start


def test_a_vocabulary_of_bytes_has_a_newline():
    """Llama's kind without its special tokens, whose newline is the byte 10."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0} | {f"<0x{i:02X}>": 1 + i for i in range(256)} | {"a": 257}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.ByteFallback()
    assert harness.start_id(HuggingFaceTokenizer(made.to_str())) == 1 + ord("\n")


def test_a_tokenizer_without_newline_and_special_ids_has_no_start():
    with pytest.raises(InputError, match=r"huggingface.* none for a newline; convert"):
        harness.start_id(words())


class Bar:
    """Counts like tqdm's."""

    made: ClassVar[list] = []

    def __init__(self, *, total, disable, desc):
        self.total, self.hidden, self.desc, self.count = total, disable, desc, 0
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, rows):
        self.count += rows


def test_batch_size_is_halved_while_memory_is_full_and_the_bar_counts_every_request(
    folder, monkeypatch, capsys
):
    adapter = harness.Adapter(folder / "letters", batch_size="auto", progress=Bar)
    expected = harness.Adapter(folder / "letters", batch_size=1)
    sizes, original = [], scoring._read

    def read(model, params, inputs, targets, batch_size):
        sizes.append(batch_size)
        if batch_size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return original(model, params, inputs, targets, batch_size)

    pairs = requests(("a", "b"), ("the", " cat"), ("c", ""), ("d", "e"), ("", "f"), ("g", "h"))
    wanted = expected.loglikelihood(pairs)
    monkeypatch.setattr(scoring, "_read", read)
    for (mine, greedy), (theirs, also) in zip(adapter.loglikelihood(pairs), wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4) and greedy == also
    assert sizes[-1] == 2 and "batch_size is 2 now" in capsys.readouterr().err
    adapter.generate_until(requests(("a", {"max_gen_toks": 2}), ("b", {"max_gen_toks": 3})))
    adapter.loglikelihood_rolling(requests(("abc",)), disable_tqdm=True)
    assert all(bar.count == bar.total for bar in Bar.made) and len(Bar.made) == 3
    assert [bar.hidden for bar in Bar.made] == [False, False, True]
    fixed = harness.Adapter(folder / "letters", batch_size=3)
    with pytest.raises(jax.errors.JaxRuntimeError):
        fixed.loglikelihood(pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": 3},
        {"until": [b"x"]},
        {"max_gen_toks": "x"},
        {"max_gen_toks": float("nan")},
        {"max_gen_toks": 2.5},
        {"max_new_tokens": [1]},
        {"max_length": "x"},
        {"temperature": "x"},
    ],
)
def test_settings_of_another_type_name_field_and_value(settings, adapter):
    [(name, value)] = settings.items()
    with pytest.raises(InputError) as error:
        adapter.generate_until(requests(("a", settings)))
    assert str(error.value).startswith(f"{name}={value!r} must be ")


def test_harness_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(SystemExit):
        cli.run(harness.main)
    assert "pip install" in capsys.readouterr().err


def test_harness_runs_local_tasks(folder, tmp_path):
    """A multiple choice, a perplexity and a generation, through the harness itself."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    with pytest.raises(InputError, match="--model_args must be checkpoint=PATH alone"):
        harness.register()(checkpint=folder)
    with pytest.raises(InputError, match="--batch_size=0 must be auto, or a number of rows"):
        harness.register()(checkpoint=folder, batch_size="0")
    model = harness.register()(checkpoint=folder / "recurrent", batch_size="auto:2")
    rows = [{"text": f"the {a} sat on the {b}", "choices": [a, b]} for a in ("cat",) for b in "xyz"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 0},
    }
    tasks = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "the",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "a",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | shared | task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )["results"]
    scores = [sum(model.loglikelihood_rolling(requests((row["text"],)))) for row in rows]
    bits = -sum(scores) / sum(len(row["text"]) for row in rows) / np.log(2)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(bits, 1e-4)
    assert 0 <= found["choice"]["acc,none"] <= 1
    assert 0 <= found["writing"]["exact_match,none"] <= 1
