"""Mamba-2: the pure recurrence, trained like the hybrids. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/mamba2.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "mamba2"
    return config
