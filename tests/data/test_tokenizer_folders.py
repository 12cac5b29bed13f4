"""What the files beside a tokenizer.json say, against AutoTokenizer of transformers."""

import json
import re

import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.data.pretrained import IdTokenizer, SpecialIds, export_files, read_tokenizer
from gt_jax.data.tokenizer_folders import model_ids
from gt_jax.errors import InputError
from gt_jax.harness import render_chat

small_tokenizers = pytest.importorskip("tests.data.small_tokenizers")
MAPS = {  # special_tokens_map.json, beside a tokenizer_config.json
    "text": ({}, {"eos_token": "</s>", "additional_special_tokens": ["<mark>"]}),
    "object": ({"eos_token": "<x>"}, {"eos_token": small_tokenizers.MARK, "bos_token": "<s>"}),
    "extra": ({"extra_special_tokens": ["</s>"]}, {"extra_special_tokens": ["<mark>", "</s>"]}),
    "both": ({"additional_special_tokens": ["</s>"]}, {"additional_special_tokens": ["<mark>"]}),
    "name": ({}, {"image_token": "<mark>"}),
    "unused": ({"added_tokens_decoder": {}}, {"eos_token": "<mark>"}),
}


@pytest.mark.parametrize("which", MAPS)
def test_older_map_of_special_tokens_is_read_as_transformers_reads_it(which, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings, of_map = MAPS[which]
    added = {"<mark>": 300, "far": 309}
    files = {"special_tokens_map": of_map, "added_tokens": added}
    for kind in ("byte-fallback", "wordpiece"):
        folder = small_tokenizers.folder_of(
            tmp_path / kind, small_tokenizers.KINDS[kind](), settings, **files
        )
        small_tokenizers.compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("adds_space", [True, False])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizerFast", "LlamaTokenizer"])
def test_class_has_its_own_tokens_and_space(name, adds_space, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings = {"tokenizer_class": name, "add_prefix_space": adds_space}
    folder = small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    small_tokenizers.compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_tokens_in_the_older_file_are_added_as_transformers_adds_them(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    made = small_tokenizers.KINDS[kind]()
    size = made.get_vocab_size()
    added = {"<mark>": size + 1, "<x>": size, "sat.": size + 2, "<far>": size + 9}
    settings = {"eos_token": "<end>", "pad_token": {"content": "<x>", "__type": "AddedToken"}}
    folder = small_tokenizers.folder_of(tmp_path / "folder", made, settings, added_tokens=added)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.eos_id, ours.special.pad) == (theirs.eos_token_id, theirs.pad_token_id)
    for text in (*small_tokenizers.TEXTS, "sat.<mark>sat. <x> <far><end>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_export_of_a_tokenizer_that_adds_a_space_says_so(tmp_path):
    for adds_space in (True, False):
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": adds_space}
        small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), settings)
        exported = export_files(read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000))
        before = json.loads(exported["tokenizer.json"])["pre_tokenizer"]
        said = json.loads(exported["tokenizer_config.json"])
        # transformers 4 takes this setting from the second file, false where it is silent
        assert before["add_prefix_space"] == said.get("add_prefix_space", False) == adds_space


def test_unknown_property_of_a_token_prints_nothing(tmp_path, capfd):
    settings = {"added_tokens_decoder": {"400": small_tokenizers.MARK | {"colour": "red"}}}
    small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    assert read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000).token_id("<mark>")
    assert capfd.readouterr() == ("", "")


def test_tokens_are_added_as_far_as_the_model_has_ids(tmp_path):
    made = small_tokenizers.byte_level()
    size = made.get_vocab_size()
    settings = {"extra_special_tokens": ["<mark>", "<far>"], "eos_token": "<end>"}
    folder = small_tokenizers.folder_of(tmp_path, made, settings)
    fits = read_tokenizer(folder / "tokenizer.json", folder, size + 2)
    assert (fits.eos_id, fits.token_id("<mark>"), fits.token_id("<far>")) == (size, size + 1, None)
    assert fits.vocab_size == size + 2 and fits.encode("<end><mark>").tolist() == [size, size + 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_special_tokens": "true"}, "split_special_tokens='true' must be true or false"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files=['tokenizer.4.0"),
    ],
)
def test_settings_that_are_not_read_are_an_error(settings, message, tmp_path):
    small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    with pytest.raises(InputError, match=re.escape(message)):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


@pytest.mark.parametrize("content", [{"<x>": "a"}, {"<x>": None}, {"": []}])
def test_older_file_of_another_form_is_an_error(content, tmp_path):
    small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), {}, added_tokens=content)
    with pytest.raises(InputError, match=r"describes no token"):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({}, None, SpecialIds()),
        ({"eos_token_id": 2, "bos_token_id": 1}, None, SpecialIds(1, 2, None, (2,))),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, SpecialIds(None, 7, None, (7, 2))),
        ({"eos_token_id": 2}, {"eos_token_id": None}, SpecialIds()),
        ({"eos_token_id": None, "pad_token_id": -1}, {}, SpecialIds()),
        ({"eos_token_id": [], "pad_token_id": 3}, {}, SpecialIds(pad=3)),
        ({"pad_token_id": 10}, {}, SpecialIds()),
    ],
)
def test_ids_of_a_model_come_from_its_folder(config, generation, want, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert model_ids(tmp_path, 10) == want
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(IdTokenizer(10, want).to_dict())))
    assert tokenizer.special == want and tokenizer.stop_ids == want.stop


@pytest.mark.parametrize("wrong", [10, "2", 1.5, True, [1, "2"], {"content": "</s>"}])
def test_wrong_end_of_text_is_an_error(wrong, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(InputError, match="eos_token_id="):
        model_ids(tmp_path, 10)


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_damaged_settings_are_an_error(name, text, tmp_path):
    small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), {})
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(InputError, match=f"{name}.json is no JSON object"):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": 5},
        {"extra_special_tokens": "<x>"},
        {"extra_special_tokens": [3]},
        {"added_tokens_decoder": [1, 2]},
        {"added_tokens_decoder": {"a": 3}},
        {"eos_token": {"content": 3}},
        {"bos_token": 7},
    ],
)
def test_tokens_that_are_none_are_an_error(settings, tmp_path):
    small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    with pytest.raises(InputError, match=r"tokenizer_config.json describes no token"):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"unk_token": "<unk>", "sep_token": small_tokenizers.MARK | {"__type": "AddedToken"}}, {}),
        ({"extra_special_tokens": {"image_token": "<mark>"}, "eos_token": "</s>"}, {}),
        (
            {
                "chat_template": [
                    {"name": "tools", "template": "t"},
                    {"name": "default", "template": small_tokenizers.NAMES},
                ]
            },
            {},
        ),
        ({"chat_template": "old"}, {"chat_template.jinja": small_tokenizers.NAMES}),
        (
            {},
            {
                "chat_template.jinja": "old",
                "additional_chat_templates/default.jinja": small_tokenizers.NAMES,
            },
        ),
    ],
)
def test_chat_template_knows_the_names_that_transformers_tells_it(settings, files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings = {"chat_template": small_tokenizers.NAMES} | settings
    ids = {"model_type": "mamba2", "bos_token_id": 1, "eos_token_id": 2}
    folder = small_tokenizers.folder_of(
        tmp_path, small_tokenizers.byte_fallback(), settings, config=ids
    )
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    messages = [{"role": "user", "content": "x", "name": None}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert render_chat(tokenizer, messages, False) == expected
    assert (tokenizer.special.bos, tokenizer.eos_id) == (1, 2)


def test_other_templates_without_a_default_are_none(tmp_path):
    folder = small_tokenizers.folder_of(
        tmp_path, small_tokenizers.word_level(), {"chat_template": small_tokenizers.NAMES}
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    with pytest.raises(InputError, match="has no template"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])
