"""GF-MH at width 192 (8 M parameters), trained long: the scaled-up job, for a GPU.

    python -m gt_jax.train --config=configs/gf_mh_8m.py

Expected: not measured yet; it reads 819 M characters, which is hours of an H100.
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
