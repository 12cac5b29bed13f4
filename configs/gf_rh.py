"""GF-RH: one gate per position that begins at 70 % RWKV. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/gf_rh.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "gf-rh"
    return config
