"""GF-MH, the main job: 8 hybrid blocks of width 128, a gate per position that begins at 30 % RWKV.

A run takes 500 steps of 64 x 64 characters of Shakespeare, the defaults of configs/base.py.

    python -m gt_jax.train --config=configs/gf_mh.py

Expected: the validation loss that docs/results.md has under "What the presets end at", in half a
minute on an H200 ("Training speed" there) or 8 minutes on two CPU cores, compilation included.
"""

from gt_jax.config import default_config


def get_config():
    return default_config()
