"""RWKV-6: the pure recurrence, trained like the hybrids. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/rwkv6.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "rwkv6"
    return config
