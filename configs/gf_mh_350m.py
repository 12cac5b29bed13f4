"""GF-MH of 348 M parameters: 16 blocks of width 1024, on English Wikipedia; for a large GPU.

A step is 256 x 2048 tokens in 8 microbatches; rate and batch are those of GPT-3 at this size.
14 000 steps are 7.3 B tokens, 21 for each parameter and some four times through the text. It comes
from TensorFlow Datasets on first use; any other takes --config.data.source=FOLDER.

    python -m gt_jax.train --config=configs/gf_mh_350m.py

Expected: the loss is not measured; docs/results.md has speed and memory with half a microbatch's
rows, under "Training speed". The speed of a microbatch on random tokens:

    python -m experiments profile_training --config=configs/gf_mh_350m.py
    ... --timed_steps=10 --config.train.batch_size=32 --config.optim.grad_accumulation=1
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gf-mh-350m"
    config.model.remat = "dots"
    config.data.source = "tfds:wiki40b/en"
    config.data.tokenizer = "sentencepiece"
    config.data.vocab_size = 16384
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 700
    config.optim.grad_accumulation = 8
    config.train.steps = 14_000
    config.train.batch_size = 256
    config.train.seq_len = 2048
    config.train.eval_every = 500
    config.train.eval_tokens = 2_000_000
    config.checkpoint.every = 1000
    return config
