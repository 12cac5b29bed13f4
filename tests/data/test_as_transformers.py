"""tokenizer.json and special ids against transformers' AutoTokenizer on the same folder."""

import json
import re

import pytest

from gt_jax.data import encode_corpus, tokenizer_from_dict
from gt_jax.data.corpora import Corpus
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.pretrained import (
    IdTokenizer,
    SpecialIds,
    export_files,
    export_ids,
    read_tokenizer,
)
from gt_jax.data.tokenizer_folders import model_ids
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.generation.prompts import encode_prompt
from gt_jax.harness import render_chat, start_id

small_tokenizers = pytest.importorskip("tests.data.small_tokenizers")
TEXTS = (
    "the cat sat.",
    " the  cat\n",
    "don't you, it's fine!",
    "你好 🙂 été",
    "<s>the</s> cat <mark> sat<|endoftext|>the",
    "",
)
MARK = {"content": "<mark>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
NAMES = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ sep_token }}|{{ image_token }}|"
    "{{ tools is defined }}|{{ tools is none }}|{{ documents is none }}|{{ messages }}"
)
OBJECT = {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": False}
SETTINGS = {
    "plain": {},
    "end": {"eos_token": "</s>", "bos_token": {"content": "<s>", "__type": "AddedToken"}},
    "new": {"pad_token": "<pad>", "eos_token": None, "extra_special_tokens": ["<mark>"]},
    "strips": {"added_tokens_decoder": {"400": MARK}, "unk_token": "<mark>"},
    "cleans": {"clean_up_tokenization_spaces": True},
    "truncates": {"model_max_length": 4},
    "splits": {"split_special_tokens": True, "eos_token": "</s>", "pad_token": "<mark>"},
    "cleans-bpe": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    },
    "names": {"image_token": "<mark>", "x_token": OBJECT, "y_token": 5, "sep_token": "<sep>"},
    "dict": {
        "extra_special_tokens": {"image_token": "<mark>"},
        "additional_special_tokens": ["</s>", OBJECT],
    },
    "plain-extra": {
        "added_tokens_decoder": {"400": MARK | {"special": False}},
        "extra_special_tokens": ["<mark>"],
    },
    "empty": {"added_tokens_decoder": {}, "extra_special_tokens": []},
}
MAPS = {  # special_tokens_map.json, beside a tokenizer_config.json
    "text": ({}, {"eos_token": "</s>", "additional_special_tokens": ["<mark>"]}),
    "object": ({"eos_token": "<x>"}, {"eos_token": MARK, "bos_token": "<s>"}),
    "extra": ({"extra_special_tokens": ["</s>"]}, {"extra_special_tokens": ["<mark>", "</s>"]}),
    "both": ({"additional_special_tokens": ["</s>"]}, {"additional_special_tokens": ["<mark>"]}),
    "name": ({}, {"image_token": "<mark>"}),
    "unused": ({"added_tokens_decoder": {}}, {"eos_token": "<mark>"}),
}


def folder_of(path, made, settings, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(made.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_folder_is_read_as_transformers_reads_it(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    made = small_tokenizers.KINDS[kind]()
    if settings == "truncates":
        made.enable_truncation(max_length=4)
        made.enable_padding(length=12)
    folder = folder_of(tmp_path / "folder", made, SETTINGS[settings])
    compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("which", MAPS)
def test_older_map_of_special_tokens_is_read_as_transformers_reads_it(which, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings, of_map = MAPS[which]
    added = {"<mark>": 300, "far": 309}
    files = {"special_tokens_map": of_map, "added_tokens": added}
    for kind in ("byte-fallback", "wordpiece"):
        folder = folder_of(tmp_path / kind, small_tokenizers.KINDS[kind](), settings, **files)
        compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("adds_space", [True, False])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizerFast", "LlamaTokenizer"])
def test_class_has_its_own_tokens_and_space(name, adds_space, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings = {"tokenizer_class": name, "add_prefix_space": adds_space}
    folder = folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


def compare(folder, theirs):
    """Ids, text and special tokens as transformers gives them, also from what is stored."""
    ours = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    ours = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.special.bos, ours.eos_id, ours.special.pad) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ids
        assert ours.encode(text, special=True).tolist() == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)
    everything = list(range(ours.vocab_size + 3))
    assert ours.decode(everything) == theirs.decode(everything)


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_tokens_in_the_older_file_are_added_as_transformers_adds_them(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    made = small_tokenizers.KINDS[kind]()
    size = made.get_vocab_size()
    added = {"<mark>": size + 1, "<x>": size, "sat.": size + 2, "<far>": size + 9}
    settings = {"eos_token": "<end>", "pad_token": {"content": "<x>", "__type": "AddedToken"}}
    folder = folder_of(tmp_path / "folder", made, settings, added_tokens=added)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.eos_id, ours.special.pad) == (theirs.eos_token_id, theirs.pad_token_id)
    for text in (*TEXTS, "sat.<mark>sat. <x> <far><end>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_tokens_are_added_as_far_as_the_model_has_ids(tmp_path):
    made = small_tokenizers.byte_level()
    size = made.get_vocab_size()
    settings = {"extra_special_tokens": ["<mark>", "<far>"], "eos_token": "<end>"}
    folder = folder_of(tmp_path, made, settings)
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
    folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    with pytest.raises(InputError, match=re.escape(message)):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


@pytest.mark.parametrize("content", [{"<x>": "a"}, {"<x>": None}, {"": []}])
def test_older_file_of_another_form_is_an_error(content, tmp_path):
    folder_of(tmp_path, small_tokenizers.byte_level(), {}, added_tokens=content)
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
    folder_of(tmp_path, small_tokenizers.byte_level(), {})
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
    folder_of(tmp_path, small_tokenizers.byte_level(), settings)
    with pytest.raises(InputError, match=r"tokenizer_config.json describes no token"):
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 1000)


def test_tokenizers_of_llama_begin_texts_and_part_documents(tmp_path):
    made = small_tokenizers.byte_fallback(start=True)
    folder = folder_of(tmp_path, made, {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    assert start_id(tokenizer) == 1 and tokenizer.stop_ids == (2,)
    assert encode_prompt(tokenizer, "ab", "p").tolist() == made.encode("ab").ids
    assert encode_prompt(tokenizer, "<s>ab", "p").tolist()[:2].count(1) == 1
    first, second = encode_corpus(Corpus("x", ("ab", "cd"), ()), tokenizer).train
    assert (first[0], first[-1], second[0], second[-1]) == (1, 2, 1, 2)


def test_line_typed_after_other_text_continues_it():
    for kind in small_tokenizers.KINDS:
        tokenizer = HuggingFaceTokenizer(small_tokenizers.KINDS[kind]().to_str())
        whole, before = tokenizer.encode("the cat\nthe cat").tolist(), tokenizer.encode("the cat")
        found = encode_prompt(tokenizer, "\nthe cat", "prompt", after="the cat").tolist()
        assert [*before, *found] == whole, kind


def test_half_a_surrogate_pair_is_an_error_of_one_line():
    tokenizer = HuggingFaceTokenizer(small_tokenizers.byte_level().to_str())
    with pytest.raises(InputError, match="half a surrogate pair"):
        tokenizer.encode("a\ud83d")


def test_exports_tell_the_tokenizers_own_ids_or_null(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    assert export_ids(CharTokenizer("abc")) == none
    assert json.loads(export_files(CharTokenizer("abc"))["generation_config.json"]) == none
    text = small_tokenizers.unigram().to_str()
    tokenizer = HuggingFaceTokenizer(text, SpecialIds(None, 1, None, (1, 5)))
    files = export_files(tokenizer)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba2"} | export_ids(tokenizer))
    )
    for read in (transformers.AutoConfig, transformers.GenerationConfig):
        found = read.from_pretrained(tmp_path)
        assert found.eos_token_id == [1, 5]
        assert found.bos_token_id is None and found.pad_token_id is None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs.eos_token_id == 1
        and theirs.encode("the cat") == tokenizer.encode("the cat").tolist()
    )


def test_exports_keep_what_the_folder_says(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings = SETTINGS["splits"] | SETTINGS["cleans-bpe"] | {"chat_template": NAMES}
    config = {"model_type": "mamba2", "bos_token_id": 0}
    folder = folder_of(tmp_path / "a", small_tokenizers.byte_level(), settings, config=config)
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    exported = tmp_path / "b"
    exported.mkdir()
    for name, content in export_files(tokenizer).items():
        (exported / name).write_text(content)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    again = read_tokenizer(exported / "tokenizer.json", exported, 1000)
    assert again.special[:3] == tokenizer.special[:3] and tokenizer.special.bos == 0
    assert again.to_dict() | {"special": None} == tokenizer.to_dict() | {"special": None}
    for text in ("the</s> cat .", "it 's <mark>"):
        read = transformers.AutoTokenizer.from_pretrained(exported)
        assert tokenizer.encode(text).tolist() == read.encode(text) == theirs.encode(text)
        assert tokenizer.decode(read.encode(text)) == read.decode(read.encode(text))


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"unk_token": "<unk>", "sep_token": MARK | {"__type": "AddedToken"}}, {}),
        ({"extra_special_tokens": {"image_token": "<mark>"}, "eos_token": "</s>"}, {}),
        (
            {
                "chat_template": [
                    {"name": "tools", "template": "t"},
                    {"name": "default", "template": NAMES},
                ]
            },
            {},
        ),
        ({"chat_template": "old"}, {"chat_template.jinja": NAMES}),
        ({}, {"chat_template.jinja": "old", "additional_chat_templates/default.jinja": NAMES}),
    ],
)
def test_chat_template_knows_the_names_that_transformers_tells_it(settings, files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    settings = {"chat_template": NAMES} | settings
    ids = {"model_type": "mamba2", "bos_token_id": 1, "eos_token_id": 2}
    folder = folder_of(tmp_path, small_tokenizers.byte_fallback(), settings, config=ids)
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
    folder = folder_of(tmp_path, small_tokenizers.word_level(), {"chat_template": NAMES})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    with pytest.raises(InputError, match="has no template"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])


def test_dialogue_is_written_as_transformers_writes_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ message.role }}] {{ message.content | tojson }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    folder = folder_of(tmp_path, small_tokenizers.byte_fallback(), settings)
    tokenizer = read_tokenizer(folder / "tokenizer.json", folder, 1000)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "été <b>"}, {"role": "assistant", "content": "x"}]
    for prompted in (True, False):
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompted
        )
        assert render_chat(tokenizer, messages, prompted) == expected
    for last in ("x", " x ", "x\n\n"):  # for the model to continue it
        told = [messages[0], {"role": "assistant", "content": last}]
        expected = theirs.apply_chat_template(told, tokenize=False, continue_final_message=True)
        assert render_chat(tokenizer, told, False, continue_final=True) == expected
    with_system = [{"role": "system", "content": "be kind"}, *messages]
    assert render_chat(tokenizer, with_system) == render_chat(tokenizer, messages)
    with pytest.raises(InputError, match="has no template"):
        render_chat(CharTokenizer("ab"), messages)
