#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3 and sentencepiece 0.2.1, beside transformers 4.57.6, Python 3.11, 2026-11-30.
#
# A SentencePiece model of Llama's kind puts one space before every text and removes it when it decodes. One would
# expect LlamaTokenizer, in its legacy form at least, to give the ids that sentencepiece gives for the same model.
# For a text that begins with a space 5.24.0 puts none before it (its pre-tokenizer adds a space only where none
# stands), and decoding still removes one: the ids are others than sentencepiece's and 4.57.6's, and the text that
# comes back has lost a space. So it is with the tokenizer.json of published models that name this class.
# Why one looks: code and continuations begin with spaces.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/train.py" <<'PY'
import json
import pathlib
import sys

import sentencepiece

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat", "and the dog sat"] * 50),
    model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=290, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=4,
)
named = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False}
(folder / "tokenizer_config.json").write_text(json.dumps(named))
own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
print("sentencepiece:", own.encode(" the cat", out_type=str), repr(own.decode(own.encode(" the cat"))))
PY
cat > "$work/show.py" <<'PY'
import logging
import sys

logging.disable(logging.WARNING)
import transformers

read = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = read.encode(" the cat", add_special_tokens=False)
print(f"transformers {transformers.__version__}:", read.convert_ids_to_tokens(ids), repr(read.decode(ids)))
PY
"$work/venv/bin/pip" install -q transformers==4.57.6 sentencepiece==0.2.1 protobuf==6.33.0
found=$("$work/venv/bin/python" "$work/train.py" "$work/folder" 2>/dev/null)$'\n'
found+=$("$work/venv/bin/python" "$work/show.py" "$work/folder" 2>/dev/null)$'\n'
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
found+=$("$work/venv/bin/python" "$work/show.py" "$work/folder" 2>/dev/null)$'\n'
echo -n "$found"
expected="sentencepiece: ['▁', '▁the', '▁cat'] ' the cat'
transformers 4.57.6: ['▁', '▁the', '▁cat'] ' the cat'
transformers 5.24.0: ['▁the', '▁cat'] 'the cat'
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
