"""GF-MH at width 768: 12 blocks, 12 RWKV heads of 64, Mamba state 128, 16384 tokens; for a GPU.

It has 154 M parameters and reads 16 x 2048 tokens a step. Shakespeare is too short for it: name a
longer text.

    python -m gt_jax.train --config=configs/gf_mh_base.py --config.data.source=FOLDER

Expected: the speed and memory that docs/results.md has under "Training speed"; at that speed, the
20 000 steps take about half an hour of an H200. The loss depends on the text and is not measured.
Its speed on random tokens:

    python -m experiments profile_training --config=configs/gf_mh_base.py --timed_steps=20
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 768
    config.model.layers = 12
    config.model.heads = 12
    config.model.state_size = 128
    config.data.source = "shakespeare-all"
    config.data.tokenizer = "sentencepiece"
    config.data.vocab_size = 16384
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 1000
    config.train.steps = 20_000
    config.model.remat = "dots"
    config.train.batch_size = 16
    config.train.seq_len = 2048
    config.train.eval_every = 1000
    config.checkpoint.every = 5000
    config.log.every = 50
    return config
