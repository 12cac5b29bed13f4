"""Tokenizers of published models."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.data.pretrained import (
    HuggingFaceTokenizer,
    IdTokenizer,
    WorldTokenizer,
    read_tokenizer,
)
from gt_jax.data.tokenizer_folders import tokenizer_settings
from gt_jax.errors import InputError

TEXTS = ["", "To be, or not to be", " 今天天气很好\n\n", "naïve café 🙂🙂", "\0\x85\u2028\x1c"]


def small_world():
    """Ids 1 to 256 are the bytes, as in the real one; then some words."""
    tokens = [bytes([i]) for i in range(256)] + [b"to", b"to be", " café".encode(), b"\n\n"]
    literals = [repr(t.decode()) if i < 128 or i > 255 else repr(t) for i, t in enumerate(tokens)]
    lines = [f"{i + 1} {literals[i]} {len(t)}\n" for i, t in enumerate(tokens)]
    return WorldTokenizer(WorldTokenizer.pack("".join(lines)))


def test_world_takes_the_longest_token():
    tokenizer = small_world()
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("to be to").tolist() == [258, ord(" ") + 1, 257]
    assert tokenizer.encode("to b").tolist() == [257, ord(" ") + 1, ord("b") + 1]
    assert tokenizer.encode("").dtype == np.int32


@pytest.mark.parametrize("text", TEXTS)
def test_world_gives_every_text_back(text):
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(small_world().to_dict())))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_world_decodes_what_is_no_text():
    tokenizer = small_world()
    assert tokenizer.decode([ord("a") + 1, 0, 0xE4 + 1, 9999]) == "a\ufffd\ufffd"
    assert tokenizer.decode([]) == ""


def test_world_vocabulary_of_the_rwkv_package():
    package = importlib.util.find_spec("rwkv")
    if package is None:
        pytest.skip("the rwkv package is not installed")
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    path = Path(package.origin).parent / "rwkv_vocab_v20230424.txt"
    theirs = TRIE_TOKENIZER(str(path))
    ours = WorldTokenizer(WorldTokenizer.pack(path.read_text(encoding="utf-8")))
    assert ours.vocab_size == 65530
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_hugging_face_tokenizer_adds_no_special_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "to": 1, "be": 2, "[unk]": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[unk]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = HuggingFaceTokenizer(model.to_str())
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("to be or").tolist() == [1, 2, 3]
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.decode(np.array([0, 1, 2])) == "<s> to be"
    with pytest.raises(InputError, match="cannot be read"):
        HuggingFaceTokenizer("{}")


def test_ids_stand_for_themselves():
    tokenizer = tokenizer_from_dict(IdTokenizer(29).to_dict())
    assert tokenizer.encode("17 4  2\n").tolist() == [17, 4, 2]
    assert tokenizer.decode(np.array([17, 4])) == "17 4"
    for text in ("29", "-1", "ROMEO:", "1.5"):
        with pytest.raises(InputError, match="write ids from 0 to 28"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"]
)
def test_devices_in_a_models_folder_are_refused_unread(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "chat_template.jinja":  # no file, as if there were none
        assert tokenizer_settings(tmp_path)["chat_template"] is None
        return
    with pytest.raises(InputError, match="it is no regular file"):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 10)
