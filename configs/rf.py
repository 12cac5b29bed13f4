"""RF: the RWKV branch plus a projection of the Mamba branch. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/rf.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "rf"
    return config
