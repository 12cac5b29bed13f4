"""GF-MH of 1.37 B parameters: 16 blocks of width 2048, on English Wikipedia; for a large GPU.

A step is 512 x 2048 tokens in 32 microbatches; rate and batch are those of GPT-3 at this size.
8000 steps are 8.4 B tokens, some four times through the text, after which repeats teach little; a
longer run needs more of it: --config.data.source=FOLDER. Moments in bfloat16 save 5 GiB.

    python -m gt_jax.train --config=configs/gf_mh_1b.py

Expected: the loss is not measured; docs/results.md has speed and memory of a microbatch, under
"Training speed". The speed of a microbatch on random tokens:

    python -m experiments profile_training --config=configs/gf_mh_1b.py
    ... --timed_steps=10 --config.train.batch_size=16 --config.optim.grad_accumulation=1
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gf-mh-1b"
    config.model.remat = "dots"
    config.data.source = "tfds:wiki40b/en"
    config.data.tokenizer = "sentencepiece"
    config.data.vocab_size = 32768
    config.optim.lr = 2e-4
    config.optim.warmup_steps = 400
    config.optim.moments_dtype = "bfloat16"
    config.optim.grad_accumulation = 32
    config.train.steps = 8000
    config.train.batch_size = 512
    config.train.seq_len = 2048
    config.train.eval_every = 500
    config.train.eval_tokens = 2_000_000
    config.checkpoint.every = 500
    return config
