"""HY: per-channel gains on normalised branches. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/hy.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "hy"
    return config
