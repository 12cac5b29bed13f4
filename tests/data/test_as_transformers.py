"""tokenizer.json and special ids against transformers' AutoTokenizer on the same folder."""

import json

import pytest

from gt_jax.data import encode_corpus
from gt_jax.data.corpora import Corpus
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.pretrained import (
    SpecialIds,
    export_files,
    export_ids,
    read_tokenizer,
)
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.generation.prompts import encode_prompt
from gt_jax.harness import render_chat, start_id

small_tokenizers = pytest.importorskip("tests.data.small_tokenizers")
OBJECT = {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": False}
SETTINGS = {
    "plain": {},
    "end": {"eos_token": "</s>", "bos_token": {"content": "<s>", "__type": "AddedToken"}},
    "new": {"pad_token": "<pad>", "eos_token": None, "extra_special_tokens": ["<mark>"]},
    "strips": {"added_tokens_decoder": {"400": small_tokenizers.MARK}, "unk_token": "<mark>"},
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
        "added_tokens_decoder": {"400": small_tokenizers.MARK | {"special": False}},
        "extra_special_tokens": ["<mark>"],
    },
    "empty": {"added_tokens_decoder": {}, "extra_special_tokens": []},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_folder_is_read_as_transformers_reads_it(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    made = small_tokenizers.KINDS[kind]()
    if settings == "truncates":
        made.enable_truncation(max_length=4)
        made.enable_padding(length=12)
    folder = small_tokenizers.folder_of(tmp_path / "folder", made, SETTINGS[settings])
    small_tokenizers.compare(folder, transformers.AutoTokenizer.from_pretrained(folder))


def test_tokenizers_of_llama_begin_texts_and_part_documents(tmp_path):
    made = small_tokenizers.byte_fallback(start=True)
    folder = small_tokenizers.folder_of(tmp_path, made, {"bos_token": "<s>", "eos_token": "</s>"})
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
    settings = (
        SETTINGS["splits"] | SETTINGS["cleans-bpe"] | {"chat_template": small_tokenizers.NAMES}
    )
    config = {"model_type": "mamba2", "bos_token_id": 0}
    folder = small_tokenizers.folder_of(
        tmp_path / "a", small_tokenizers.byte_level(), settings, config=config
    )
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


def test_dialogue_is_written_as_transformers_writes_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ message.role }}] {{ message.content | tojson }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    folder = small_tokenizers.folder_of(tmp_path, small_tokenizers.byte_fallback(), settings)
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
