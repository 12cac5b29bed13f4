"""Small tokenizers of every kind that a tokenizer.json can hold; needs the tokenizers package."""

import json
import string

import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.data.pretrained import read_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json needs it")

from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

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
)  # a chat template

TEXT = "the cat sat on the mat. don't you, it's fine! 你好 été " * 20


def byte_level():
    """GPT-2's kind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return made


def byte_fallback(start=False):
    """Llama's and Mistral's kind; with <s> before every text if `start`."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for token in ["▁", "好", *string.ascii_lowercase, ".", "▁t", "▁th", "▁the", "▁c"]:
        vocab[token] = len(vocab)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c")]
    made = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    if start:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return made


def wordpiece():
    """BERT's kind."""
    vocab = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "mat", ".", ",", "'", "s", "it", "don", "t"]
    vocab += ["##s", "##t", "##at", "c", "!", "你", "好"]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def word_level():
    """Words, without a decoder; ids have a gap."""
    vocab = {"[unk]": 0, "the": 1, "cat": 2, ".": 9}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def unigram():
    """T5's and XGLM's kind."""
    tokens = ["<unk>", "</s>", "▁", "▁the", "▁cat", "▁c", "at", *string.ascii_lowercase, ".", "好"]
    made = Tokenizer(models.Unigram([(t, -float(i)) for i, t in enumerate(tokens)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    return made


def end_of_word():
    """CLIP's and the first GPT's kind, whose last token decodes otherwise than those before."""
    tokens = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], end_of_word_suffix="</w>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder()
    return made


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "wordpiece": wordpiece,
    "word-level": word_level,
    "unigram": unigram,
    "end-of-word": end_of_word,
}


def folder_of(path, made, settings, **files):
    """`path`, with a tokenizer.json, tokenizer_config.json and other JSON files in it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(made.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


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
        assert ours.encode(text).tolist() == ids, text
        assert ours.encode(text, special=True).tolist() == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)
    everything = list(range(ours.vocab_size + 3))
    assert ours.decode(everything) == theirs.decode(everything)
