#!/usr/bin/env bash
# lm_eval 0.4.13 with transformers 5.24.0, torch 2.13.0, Python 3.11, 2026-11-29.
#
# Two requests of one list hold the same tokens, divided at two places: "the cat sat" + " on a mat" and
# "the cat sat on" + " a mat". One would expect each score to be what it is when the request stands alone.
# HFLM reuses logits by default (logits_cache=True, meant for continuations of one token): it groups requests whose
# context and continuation, less the last token, are equal, and reads the second score at the first one's place.
# The second score is that of other positions. With logits_cache=False both are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q lm_eval==0.4.13 transformers==5.24.0 torch==2.13.0 accelerate==1.15.0
cat > "$work/show.py" <<'PY'
import logging

logging.disable(logging.WARNING)
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = ["<eos>", *"the cat sat on a mat".split()]
own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
own.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=32)
model = GPT2LMHeadModel(GPT2Config(initializer_range=1.0, **sizes)).eval()


def scores(*pairs, **settings):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", **settings)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [round(score, 2) for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]


early, late = ("the cat sat", " on a mat"), ("the cat sat on", " a mat")
print("each alone:", scores(early) + scores(late))
print("in one list:", scores(early, late))
print("in one list, logits_cache=False:", scores(early, late, logits_cache=False))
PY
found=$(HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/show.py" 2>/dev/null)
echo "$found"
expected="each alone: [-3.11, -3.1]
in one list: [-3.11, -25.33]
in one list, logits_cache=False: [-3.11, -3.1]"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
