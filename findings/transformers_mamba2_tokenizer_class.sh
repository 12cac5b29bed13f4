#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3, Python 3.11, 2026-11-29.
#
# A folder of a Mamba-2 model holds config.json (model_type mamba2) and a complete tokenizer.json. One would expect
# AutoTokenizer to encode with what tokenizer.json says, as the tokenizers package does.
# Without tokenizer_config.json, or without a tokenizer_class in it, AutoTokenizer goes by model_type instead: mamba2
# stands for GPTNeoXTokenizer, which puts a byte-level pre-tokenizer and decoder in place of those in the file.
# With tokenizer_class PreTrainedTokenizerFast the ids are those of the file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat > "$work/show.py" <<'PY'
import json
import logging
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers

logging.disable(logging.WARNING)
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1])
words = {word: i for i, word in enumerate(["<unk>", "the", "cat", "sat"])}
own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
own.pre_tokenizer = pre_tokenizers.Whitespace()
own.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
text = "the cat sat"
print("tokenizers:", own.encode(text).ids)
bare = AutoTokenizer.from_pretrained(folder)
print("AutoTokenizer:", type(bare).__name__, bare(text)["input_ids"])
named = {"tokenizer_class": "PreTrainedTokenizerFast"}
(folder / "tokenizer_config.json").write_text(json.dumps(named))
told = AutoTokenizer.from_pretrained(folder)
print("with tokenizer_class:", told(text)["input_ids"])
PY
mkdir "$work/model"
found=$("$work/venv/bin/python" "$work/show.py" "$work/model" 2>/dev/null)
echo "$found"
expected="tokenizers: [1, 2, 3]
AutoTokenizer: GPTNeoXTokenizer []
with tokenizer_class: [1, 2, 3]"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
