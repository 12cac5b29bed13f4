"""Mutated config.json, tokenizers and checkpoint folders: taken if nothing has changed, or refused.

What is taken must be the model that was stored: no fault may silently make another.
"""

import base64
import contextlib
import dataclasses
import json
import zlib

import numpy as np
import pytest

from gt_jax import convert, stored
from gt_jax.config import Config, to_dict
from gt_jax.convert import LAYOUTS, card, files, settings
from gt_jax.convert.params import shapes_of
from gt_jax.data import make_batches
from gt_jax.data.pretrained import HuggingFaceTokenizer, IdTokenizer, WorldTokenizer
from gt_jax.data.tokenizers import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.training.job import progress_of
from gt_jax.training.progress import Progress
from tests.convert import small
from tests.hostile.mutations import bounded, mutate, mutate_json

FILES = 1200
PAIRS = [("rwkv6", "rwkv-hf"), ("rwkv6", "fla"), ("mamba2", "mamba-ssm"), ("mamba2", "mamba2-hf")]


@pytest.fixture(scope="module", params=PAIRS, ids=[layout for _, layout in PAIRS])
def source(request, tmp_path_factory):
    """(layout, its tensors and config.json as they are stored)."""
    name, layout = request.param
    folder = tmp_path_factory.mktemp(layout) / "folder"
    files.write_folder(
        folder, "pytorch_model.bin", small.arrays_of(name, layout), small.config_of(name, layout)
    )
    return layout, files.read(folder)


def test_mutated_settings(source):
    layout, found = source
    known = LAYOUTS[layout].settings
    free = known.free - {"ssm_cfg", "vocab_size"} | settings.OF_EVERY_MODEL
    _, config, _ = convert._recognise(found)
    rng, taken = np.random.default_rng(0), 0
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            changed = mutate_json(rng, found.config)
            try:
                _, now, unset = convert._recognise(found._replace(config=changed))
            except InputError as error:
                assert "\n" not in str(error) and str(error).isprintable()
                continue
            taken += 1
            # Whether the head is tied is compared with the tensors, when they are read.
            assert dataclasses.replace(now, tie_embeddings=config.tie_embeddings) == config
            for name in set(changed) | set(found.config):
                old, new = found.config.get(name), changed.get(name)
                assert name in free or new is None or new == old or name == "ssm_cfg", (name, new)
            assert {name for name in changed if name not in found.config} <= free | set(unset)
    assert taken > FILES / 100


def test_mutated_text_of_config(source, quick_folder):
    _, found = source
    text, rng = json.dumps(found.config).encode(), np.random.default_rng(1)
    path = quick_folder / "config.json"
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            path.write_bytes(mutate(rng, text))
            try:
                convert._recognise(found._replace(config=files.read_json(path)))
            except InputError as error:
                assert str(error).isprintable()


# Tokenizers.

LINES = "".join(
    f"{i} {literal} {size}\n"
    for i, (literal, size) in enumerate(
        [("'a'", 1), ("'\\n'", 1), ("b'\\xff\\xfe'", 2), ("'été'", 5), ("'abc'", 3)], start=1
    )
)


def use(make):
    """A tokenizer that can be used, or an InputError in one line."""
    try:
        tokenizer = make()
        ids = tokenizer.encode("a\nabc")
        assert ids.dtype == np.int32 and ids.max(initial=0) < tokenizer.vocab_size
        tokenizer.decode(ids)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_mutated_vocabularies():
    rng = np.random.default_rng(2)
    packed = base64.b64decode(WorldTokenizer.pack(LINES))
    assert use(lambda: WorldTokenizer(WorldTokenizer.pack(LINES)))
    with bounded() as next_file:
        for i in range(FILES):
            next_file()
            if i % 2:
                text = mutate(rng, LINES.encode()).decode("utf-8", "replace")
                vocabulary = WorldTokenizer.pack(text)
            else:
                vocabulary = base64.b64encode(mutate(rng, packed)).decode()
            use(lambda vocabulary=vocabulary: WorldTokenizer(vocabulary))


@pytest.mark.parametrize(
    "vocabulary",
    [
        base64.b64encode(zlib.compress(bytes(1 << 30), 1)).decode(),  # 1 GB in 5 MB
        WorldTokenizer.pack("1 1000000000 1000000000\n"),  # bytes(10**9)
        WorldTokenizer.pack("1 " + "(" * 5000 + " 3\n"),
        WorldTokenizer.pack("1 " + "-" * 9000 + "1 3\n"),
        WorldTokenizer.pack("1 '" + "a" * (1 << 20) + f"' {1 << 20}\n"),
        WorldTokenizer.pack("99999999999999 'a' 1\n"),
        WorldTokenizer.pack("-3 'a' 1\n"),
        WorldTokenizer.pack("1 'a' x\n"),
        WorldTokenizer.pack("1 ['a'] 1\n"),
        "not base64 at all",
        "",
        None,
        7,
    ],
    ids=range(13),
)
def test_vocabularies_out_of_proportion_are_refused(vocabulary):
    with bounded():
        assert not use(lambda: WorldTokenizer(vocabulary))


def tokenizer_json():
    tokenizers = pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "\u010a": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer.to_str()


def unigram_json():
    """A tokenizer.json with every optional part."""
    tokenizers = pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    pre, post, back = (
        getattr(tokenizers, name) for name in ("pre_tokenizers", "processors", "decoders")
    )
    vocabulary = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5), ("\u2581", -3.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0, False))
    tokenizer.normalizer = tokenizers.normalizers.Replace("x", "a")
    tokenizer.pre_tokenizer = pre.Sequence([pre.Split(" ", "isolated"), pre.Metaspace()])
    tokenizer.post_processor = post.TemplateProcessing("a $A", None, [("a", 1)])
    tokenizer.decoder = back.Sequence([back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    return tokenizer.to_str()


@pytest.mark.parametrize("make_json", [tokenizer_json, unigram_json])
def test_mutated_tokenizer_json(make_json):
    text, rng = make_json(), np.random.default_rng(3)
    content = json.loads(text)
    assert use(lambda: HuggingFaceTokenizer(text))
    with bounded() as next_file:
        for i in range(FILES):
            next_file()
            if i % 2:
                changed = mutate(rng, text.encode(), most=2).decode("utf-8", "replace")
            else:
                changed = json.dumps(mutate_json(rng, content))
            use(lambda changed=changed: HuggingFaceTokenizer(changed))


def test_panics_of_the_tokenizers_package_are_one_line():
    """They are no Exceptions: one when the file is read, one when it is used."""
    content = json.loads(tokenizer_json())
    content["model"]["continuing_subword_prefix"] = "x" * 5000
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read \("):
        HuggingFaceTokenizer(json.dumps(content))
    content = json.loads(unigram_json())
    content["model"]["unk_id"] = None
    with pytest.raises(InputError, match=r"tokenizer.json cannot encode this text \("):
        HuggingFaceTokenizer(json.dumps(content)).encode("no such letter")


def test_padding_and_truncation_without_measure_do_nothing():
    """A padding of 2^62 tokens would end the process, a stride above the length its encoding."""
    content = json.loads(unigram_json())
    content["truncation"]["stride"] = 50
    content["padding"]["strategy"] = {"Fixed": 2**62}
    assert len(HuggingFaceTokenizer(json.dumps(content)).encode("ab" * 9)) >= 9


# Checkpoint folders of our own.


def test_mutated_descriptions_of_a_checkpoint(tmp_path):
    rng, config = np.random.default_rng(4), small.MODELS["mamba2"]
    about = {
        "model": dataclasses.asdict(config),
        "tokenizer": IdTokenizer(small.VOCAB).to_dict(),
        "config": {"model": {"dtype": "float32"}},
    }
    shapes = shapes_of(config)
    (tmp_path / "params").mkdir()
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            try:
                now, tokenizer = stored.describe(tmp_path, mutate_json(rng, about), shapes)
            except InputError as error:
                assert str(error).isprintable()
                continue
            sizes = ("architecture", "vocab_size", "dim", "layers")
            assert all(getattr(now, name) == getattr(config, name) for name in sizes[1:])
            assert tokenizer.vocab_size <= now.vocab_size


def test_mutated_descriptions_of_a_run(tmp_path):
    """By what evaluates it, continues it and describes it in an exported folder."""
    rng, config, folder = np.random.default_rng(8), Config(), tmp_path / "checkpoints" / "9"
    about = {
        "step": 9,
        "config": to_dict(config),
        "progress": dataclasses.asdict(Progress(best_loss=1.5, best_step=6, losses=[1.5, 2.0])),
        "batches": {"epoch": 1, "index": 2},
    }
    ids = np.arange(100, dtype=np.int32)
    with bounded() as next_file:
        for _ in range(FILES // 4):
            next_file()
            found = mutate_json(rng, about)
            for use, more in (
                (stored.run_config, ()),
                (progress_of, (config, tmp_path)),
                (card.training_of, ()),
                (_position, (ids,)),
            ):
                try:
                    use(folder, found, *more)
                except InputError as error:
                    assert str(error).isprintable()


def _position(folder, about, ids):
    batches = make_batches([ids], batch_size=2, seq_len=4, order="windows", seed=0)
    place = batches.state() | {"epoch": 1, "index": 2}
    with stored.readable(folder):
        batches.restore(place | about["batches"] if about["batches"] else about["batches"])
        assert next(batches).inputs.shape == (2, 4)


def test_mutated_stored_tokenizers():
    rng = np.random.default_rng(5)
    stored_tokenizers = [
        {"kind": "rwkv-world", "vocabulary": WorldTokenizer.pack(LINES)},
        {"kind": "char", "alphabet": "abc\n"},
        {"kind": "ids", "vocab_size": 9},
    ]
    with bounded() as next_file:
        for i in range(FILES):
            next_file()
            d = mutate_json(rng, stored_tokenizers[i % 3])
            # `stored.describe` makes one line of any of them.
            with contextlib.suppress(InputError, KeyError, TypeError, ValueError, AttributeError):
                tokenizer_from_dict(d)
