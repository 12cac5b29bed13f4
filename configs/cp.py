"""CP: both branches side by side through one projection. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/cp.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "cp"
    return config
