"""What transformers reads of a tokenizer: tokenizer.json, or Python for RWKV's World vocabulary.

Characters are words of one character. SentencePiece's BPE is a list of merges, best score first.
"""

import base64
import json
from pathlib import Path
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.data.pretrained import WorldTokenizer, export_files

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's own
_NAMED = ("bos", "eos", "pad")
WORLD_CODE = "tokenization_rwkv_world.py"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> content of the files that transformers reads of any tokenizer that it has a form for.

    An IdTokenizer has none: generation_config.json alone.
    """
    texts = export_files(tokenizer) | world_files(tokenizer)
    model = _model(tokenizer)
    if model is None:
        return texts
    named = {f"{name}_token": getattr(tokenizer.special, name) for name in _NAMED}
    vocab = model["model"]["vocab"]
    token_of = {number: token for token, number in vocab.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {name: token_of[i] for name, i in named.items() if i is not None}
    return texts | {
        "tokenizer.json": json.dumps(model, indent=1, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def world_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> content of what, beside the vocabulary, AutoTokenizer needs of a WorldTokenizer.

    No form of tokenizer.json takes the longest byte string, so the folder has Python of its own,
    which runs with trust_remote_code=True. Of other tokenizers {}.
    """
    if not isinstance(tokenizer, WorldTokenizer):
        return {}
    settings = {
        "tokenizer_class": "RwkvWorldTokenizer",
        "auto_map": {"AutoTokenizer": [f"{WORLD_CODE[:-3]}.RwkvWorldTokenizer", None]},
        "clean_up_tokenization_spaces": False,
    }
    code = Path(__file__).parent / "pytorch" / "world_tokenizer.py"
    return {
        WORLD_CODE: code.read_text("utf-8").replace("  # noqa: RUF012", ""),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _model(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The content of tokenizer.json; None where this module knows none."""
    stored = tokenizer.to_dict()
    if tokenizer.kind in ("char", "char97"):
        return _characters(stored["alphabet"], tokenizer)
    if tokenizer.kind == "sentencepiece":
        return _byte_pairs(base64.b64decode(stored["model"]))
    return None


def _characters(alphabet: str, tokenizer: Any) -> dict[str, Any]:
    tags = getattr(tokenizer, "tags", ())
    vocab = {tag: i for i, tag in enumerate(tags)}
    vocab |= {character: tokenizer.first_id + i for i, character in enumerate(alphabet)}
    # Without tags there is no token for an unknown character, so encoding one is an error.
    unknown = tags[1] if tags else "<unknown>"
    whole = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "added_tokens": [_special(i, tag) for i, tag in enumerate(tags)],
        "pre_tokenizer": whole | {"invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
    }


def _byte_pairs(model: bytes) -> dict[str, Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    subwords = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    is_text = lambda i: (
        not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
    )
    text = {subword: i for i, subword in enumerate(subwords) if is_text(i)}
    merges = []
    for subword in sorted(text, key=lambda subword: -processor.get_score(text[subword])):
        splits = ((subword[:cut], subword[cut:]) for cut in range(1, len(subword)))
        merges += [list(pair) for pair in splits if pair[0] in text and pair[1] in text]
    control = [i for i in range(len(subwords)) if processor.is_control(i)]
    unknown = processor.unk_id()
    return {
        "version": "1.0",
        "added_tokens": [_special(i, subwords[i]) for i in sorted([*control, unknown])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {subword: i for i, subword in enumerate(subwords)},
            "merges": merges,
            "unk_token": subwords[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _special(i: int, token: str) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": True} | sides
