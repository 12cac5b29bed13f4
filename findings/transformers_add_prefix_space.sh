#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3, beside transformers 4.57.6, Python 3.11, 2026-11-30.
#
# add_prefix_space=True asks for a space before a text, so that its first word has the ids that it has elsewhere. For a
# folder of PreTrainedTokenizerFast with a byte-level tokenizer.json, one would expect the setting to act, whether
# tokenizer_config.json holds it or from_pretrained gets it, or to be refused.
# 4.57.6 changes the pre-tokenizer of the file. 5.24.0 takes the setting, shows it as an attribute, saves it again, and
# encodes without the space: the same folder gives other ids.
# Why one looks: scores of a model that was trained on such ids are worse, without any message.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/show.py" <<'PY'
import json
import logging
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

logging.disable(logging.WARNING)
import transformers

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.decoder = decoders.ByteLevel()
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
own.train_from_iterator(["the cat sat on the mat and the cat sat " * 9], trainer)
own.save(str(folder / "tokenizer.json"))
named = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}
(folder / "tokenizer_config.json").write_text(json.dumps(named))
read = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
tokens = read.tokenize("the cat")
print(f"transformers {transformers.__version__}: add_prefix_space={read.add_prefix_space}", tokens)
PY
"$work/venv/bin/pip" install -q transformers==4.57.6
found=$("$work/venv/bin/python" "$work/show.py" "$work/folder" 2>/dev/null)$'\n'
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
found+=$("$work/venv/bin/python" "$work/show.py" "$work/folder" 2>/dev/null)$'\n'
echo -n "$found"
expected="transformers 4.57.6: add_prefix_space=True ['Ġthe', 'Ġcat']
transformers 5.24.0: add_prefix_space=True ['the', 'Ġcat']
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
