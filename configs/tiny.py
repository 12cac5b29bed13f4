"""A small hybrid (HY, 4 blocks of width 64), to see everything work on a laptop's CPU.

    python -m gt_jax.train --config=configs/tiny.py

Expected: the validation loss that docs/results.md has under "What the presets end at" (on 16 384
characters), after 45 s on two CPU cores, compilation included.
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "tiny"
    config.optim.lr = 3e-3
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.eval_tokens = 16_384
    config.checkpoint.every = 100
    return config
