"""GF: one gate per position that begins at 50 % RWKV. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/gf.py

Expected: the validation loss and the time that docs/results.md has under "What the presets end at".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gf"
    return config
