"""HGF: one gate per position and channel. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/hgf.py

Expected: the validation loss and the time that docs/results.md has under "What the presets end at".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "hgf"
    return config
