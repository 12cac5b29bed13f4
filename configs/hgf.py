"""HGF: one gate per position and channel. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/hgf.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "hgf"
    return config
