"""GF: one gate per position that begins at 50 % RWKV. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/gf.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "gf"
    return config
