"""GF-MH at width 192, trained long: the scaled-up job, for a GPU.

The original called it 8 M parameters: 7.9 M with its RWKV branch, 6.6 M with the official one.

    python -m gt_jax.train --config=configs/gf_mh_8m.py

Expected: neither loss nor time is measured; it reads 819 M characters.
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gf-mh-8m"
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 1000
    config.optim.lr_multipliers.mamba = 0.5
    config.optim.grad_accumulation = 4
    config.train.steps = 50_000
    config.train.batch_size = 128
    config.train.seq_len = 128
    config.train.eval_every = 500
    config.train.patience = 10
    config.checkpoint.every = 5000
    config.log.every = 50
    return config
